"""`python -m bench.simulate`: the scheduler's core against lanes on paper, on a trace generated or read from a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.machine import provenance
from bench.simulate import report
from bench.simulate.engine import STEP_MODELS, Cluster, Outcome, Simulation, StepModel
from bench.simulate.trace import SimRequest, TraceError, Workload, generate, last_arrival_s, read_trace
from services.scheduler.policies.registry import POLICIES
from services.scheduler.prefill_delayer import DelayerLimits

_EVICTIONS = ("lru", "lfu", "fifo", "priority", "off")
_TABLE_COLUMNS_MAX = 300
_NUM_GENERATED = 1000


def main(arguments: list[str]) -> int:
    """Run; gives the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    outcomes: dict[str, Outcome] = {}
    try:
        for name, changes in _runs(options):
            chosen = argparse.Namespace(**{**vars(options), **changes})
            requests, expected_s = _requests(chosen)
            outcomes[name] = Simulation(_cluster(chosen)).run(requests, expected_s=expected_s)
    except (TraceError, ValueError, OSError) as error:
        parser.error(str(error))
    Console(width=_TABLE_COLUMNS_MAX).print(report.table(outcomes))
    if options.png is not None:
        report.draw(outcomes, options.png)
        print(f"written: {options.png}")
    if options.json is not None:
        runs = {name: report.as_json(outcome) for name, outcome in outcomes.items()}
        options.json.write_text(json.dumps({"provenance": provenance(), "runs": runs}, indent=2) + "\n")
        print(f"written: {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__, allow_abbrev=False)
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, help="JSONL: timestamp, input_length, output_length, hash_ids [default: generate]")
    trace.add_argument("--block-tokens", type=_at_least_1, default=512, help="tokens that one of a file's hash_ids stands for")
    trace.add_argument(
        "--num-requests", type=_at_least_1, help=f"generated: as many [default: {_NUM_GENERATED}]; of a file: the most [all]"
    )
    trace.add_argument("--rate", type=_above_0, default=4.0, help="requests a second")
    trace.add_argument("--burst", type=_at_least_1, default=1, help="requests that arrive at once")
    trace.add_argument("--input-tokens", type=_at_least_1, default=512, help="mean of a prompt's own tokens")
    trace.add_argument("--output-tokens", type=_at_least_1, default=128, help="mean")
    trace.add_argument("--sigma", type=_at_least_0, default=0.8, help="spread of both: of the logarithm")
    trace.add_argument("--prefixes", type=_natural, default=0, help="shared beginnings")
    trace.add_argument("--prefix-tokens", type=_natural, default=1024, help="their length")
    trace.add_argument("--tenant-load", type=_shares, default="1", help="shares of the requests by tenant: 10,1")
    trace.add_argument("--seed", type=_natural, default=0)
    lanes = parser.add_argument_group("lanes")
    lanes.add_argument("--lanes", type=_at_least_1, default=1)
    lanes.add_argument("--group-size", type=_at_least_1, default=1, help="lanes that step together")
    lanes.add_argument("--num-pages", type=_at_least_1, default=4096, help="KV pages a lane")
    lanes.add_argument("--page-size", type=_at_least_1, default=16)
    lanes.add_argument("--max-num-seqs", type=_at_least_1, default=64)
    lanes.add_argument("--max-num-batched-tokens", type=_at_least_1, default=512)
    lanes.add_argument(
        "--max-model-len", type=_at_least_1, default=16_384, help="most tokens of a request; longer prompts are refused"
    )
    lanes.add_argument("--step-model", default="cpu", help=f"{', '.join(STEP_MODELS)}, or a JSON file of its fields")
    scheduler = parser.add_argument_group("scheduler")
    scheduler.add_argument("--policy", choices=POLICIES, default="fcfs")
    scheduler.add_argument("--prefix-cache", choices=_EVICTIONS, default="lru")
    scheduler.add_argument(
        "--run-ahead", choices=("off", "on"), default="off", help="plan a step as soon as the one before it begins"
    )
    scheduler.add_argument("--mixed-step-target-s", type=_at_least_0, default=0.0, help="as in the settings [default: no limit]")
    scheduler.add_argument("--max-waiting-requests", type=_at_least_1, default=10**7, help="further ones are refused")
    scheduler.add_argument("--fixed-share", type=_at_least_0, help="admit by this share of what is asked for [default: measured]")
    scheduler.add_argument("--asked-tokens", type=_at_least_1, help="output every request allows [default: what it will get]")
    scheduler.add_argument("--delay-passes", type=_natural, default=30, help="see prefill_delay_passes_max")
    scheduler.add_argument("--delay-watermark", type=float, help="see prefill_delay_low_watermark")
    parser.add_argument("--compare", help="option=value,value: a run for each, side by side")
    parser.add_argument("--png", type=Path, help="draw into this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    if options.compare is None:
        yield options.policy, {}
        return
    name, _, values = options.compare.partition("=")
    key = name.replace("-", "_")
    if not values or not hasattr(options, key):
        raise ValueError(f"--compare must be an option and values, like policy=fcfs,lpm; got {options.compare!r}")
    for value in values.split(","):
        # Parsed as on the command line, so that the same checks hold.
        yield f"{name}={value}", {key: getattr(_parser().parse_args([f"--{name}", value]), key)}


def _requests(options: argparse.Namespace) -> tuple[Iterator[SimRequest], float]:
    """The trace, and about how long it is in seconds."""
    if options.trace is None:
        num_requests = options.num_requests or _NUM_GENERATED
        workload = Workload(
            num_requests=num_requests,
            rate_per_s=options.rate,
            mean_input_tokens=options.input_tokens,
            mean_output_tokens=options.output_tokens,
            sigma=options.sigma,
            burst=options.burst,
            num_prefixes=options.prefixes,
            prefix_tokens=options.prefix_tokens if options.prefixes else 0,
            tenant_load=options.tenant_load,
            seed=options.seed,
        )
        return generate(workload), num_requests / options.rate
    lines = options.trace.read_text().splitlines()[: options.num_requests]
    return read_trace(lines, block_tokens=options.block_tokens), last_arrival_s(lines)


def _cluster(options: argparse.Namespace) -> Cluster:
    return Cluster(
        num_lanes=options.lanes,
        group_size=options.group_size,
        num_pages=options.num_pages,
        page_size=options.page_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        policy=options.policy,
        eviction=None if options.prefix_cache == "off" else options.prefix_cache,
        step_model=_step_model(options.step_model),
        run_ahead=options.run_ahead == "on",
        mixed_step_target_s=options.mixed_step_target_s,
        max_waiting_requests=options.max_waiting_requests,
        fixed_share=options.fixed_share,
        asked_tokens=options.asked_tokens,
        delayer_limits=DelayerLimits(options.delay_passes, options.delay_watermark),
    )


def _step_model(name: str) -> StepModel:
    if name in STEP_MODELS:
        return STEP_MODELS[name]
    fields = json.loads(Path(name).read_text())
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: must be an object, is {type(fields).__name__}")
    known = {field.name for field in dataclasses.fields(StepModel)}
    if unknown := fields.keys() - known:
        raise ValueError(f"{name}: unknown field {min(unknown)!r}; known: {', '.join(sorted(known))}")
    if missing := [one for one in ("base_s", "row_s", "token_s") if one not in fields]:
        raise ValueError(f"{name}: {missing[0]} is missing")
    return StepModel(**fields)


def _at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _at_least_0(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_above_0(share) for share in text.split(","))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
