"""The figures of one measurement, and what must be said beside them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.peers.proc import Memory
from bench.peers.workloads import Workload
from bench.serve.records import RequestRecord
from bench.serve.summary import Slo, Summary, summarize

IDLE_SHARE_MAX = 0.02
"""A server whose turn it is not may use this share of one core; above it, it takes from the one that is measured."""
OTHER_SHARE_MAX = 0.10
"""So much of one core may be used by what is neither a server nor the client before a figure is called disturbed."""
CLIENT_SHARE_MAX = 0.2
CHUNKS_SHARE_MIN = 0.95


@dataclass(frozen=True)
class Usage:
    """Processor time used until a moment, or between two."""

    at_s: float
    cpu_s: float

    def since(self, earlier: Usage) -> Usage:
        """What was used since then, over how long."""
        return Usage(self.at_s - earlier.at_s, self.cpu_s - earlier.cpu_s)

    @property
    def share(self) -> float:
        """Of one core."""
        return self.cpu_s / self.at_s if self.at_s > 0 else 0.0


@dataclass(frozen=True)
class Figures:
    """One measurement."""

    summary: Summary
    memory: Memory
    cpu_shares: Mapping[str, float]
    """Of one core: each server, `client`, and `other`, which is all else on the machine."""
    remarks: tuple[str, ...]
    repeated_share: float | None = None
    """See `texts.repeated_share`; for a workload that repeats its input."""

    @property
    def is_disturbed(self) -> bool:
        """Whether something else on the machine took part of its cores."""
        return self.cpu_shares["other"] > OTHER_SHARE_MAX

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "summary": self.summary.as_json(),
            "memory": self.memory.as_json(),
            "cpu_shares": {name: round(share, 4) for name, share in self.cpu_shares.items()},
            "remarks": list(self.remarks),
            "repeated_share": None if self.repeated_share is None else round(self.repeated_share, 4),
        }


def used_since(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> dict[str, Usage]:
    """What each has used between two looks."""
    return {name: usage.since(before[name]) for name, usage in after.items()}


def other_share(used: Mapping[str, Usage]) -> float:
    """What all but the named used of the `machine`, of one core."""
    known_s = sum(usage.cpu_s for name, usage in used.items() if name != "machine")
    machine = used["machine"]
    return Usage(machine.at_s, max(0.0, machine.cpu_s - known_s)).share


def figures(
    workload: Workload,
    records: Sequence[RequestRecord],
    *,
    memory: Memory,
    used: Mapping[str, Usage],
    server: str,
    repeated_share: float | None = None,
) -> Figures:
    """Reduce one measurement.

    Args:
        workload: What was played.
        records: Every request, failed ones too; at least one.
        memory: The measured server's.
        used: Processor time by server, and that of `client` and `machine`.
        server: The one that was measured.
        repeated_share: Of its answers, where that was asked for.
    """
    summary = summarize(records, client_cpu_s=used["client"].cpu_s, slo=Slo())
    shares = {name: usage.share for name, usage in used.items() if name != "machine"} | {"other": other_share(used)}
    remarks = [*_request_remarks(workload, records), *_share_remarks(shares, server)]
    return Figures(summary=summary, memory=memory, cpu_shares=shares, remarks=tuple(remarks), repeated_share=repeated_share)


def _request_remarks(workload: Workload, records: Sequence[RequestRecord]) -> list[str]:
    found = []
    for kind, number in Counter(record.error_kind for record in records if record.error_kind).items():
        example = next(record.error_message for record in records if record.error_kind == kind)
        found.append(f"failed: {number} of {len(records)} requests: {kind}: {example}")
    ok = [record for record in records if record.is_ok]
    if wrong := sum(record.num_output_tokens != workload.num_output_tokens for record in ok):
        found.append(f"other lengths: {wrong} of {len(ok)} answers were not {workload.num_output_tokens} tokens long")
    if workload.num_turns == 1:
        lengths = {record.usage_prompt_tokens for record in ok} - {None, workload.num_prompt_tokens}
        if lengths:
            counted = ", ".join(map(str, sorted(filter(None, lengths))))
            found.append(f"other lengths of prompts: the server counts {counted} tokens, not {workload.num_prompt_tokens}")
    num_tokens, num_chunks = sum(record.num_output_tokens for record in ok), sum(len(record.chunk_times_ns) for record in ok)
    # A character that takes several tokens, or a token without text, makes a few chunks fewer anywhere.
    if num_chunks < CHUNKS_SHARE_MIN * num_tokens:
        found.append(f"larger chunks: {num_tokens} tokens came in {num_chunks}, and ITL is the gap between chunks")
    return found


def _share_remarks(shares: Mapping[str, float], server: str) -> list[str]:
    found = []
    for name, share in shares.items():
        if name == "other":
            if share > OTHER_SHARE_MAX:
                found.append(f"disturbed: something else on the machine used {share:.0%} of a core")
        elif name == "client":
            if share > CLIENT_SHARE_MAX:
                found.append(f"suspect: the client used {share:.0%} of a core")
        elif name != server and share > IDLE_SHARE_MAX:
            found.append(f"not idle: {name} used {share:.0%} of a core, though it was not its turn")
    return found
