"""Where tokens go, and which of them have not gone yet.

A target is one life of one detokenizer. While tokens cannot be handed to it (it is not connected yet, its queue is full, it
died), the streams concerned are *behind* from an output position on. Nothing is copied for that: a sequence keeps all its tokens,
and a finished one is kept until the rest of its output has gone, its router redirects or aborts it, or nobody has asked for
`linger_s`.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.scheduler.sequence import Sequence, Status
from services.scheduler.token_fanout import StreamBatch


class Target:
    """One life of a detokenizer.

    Attributes:
        address: Where it is reached.
        incarnation: Its life.
        num_streams: Live sequences whose tokens go there.
        behind: Sequences with output that has not gone, each with the position from which.
    """

    __slots__ = ("address", "behind", "incarnation", "num_streams")

    def __init__(self, address: str, incarnation: int) -> None:
        self.address = address
        self.incarnation = incarnation
        self.num_streams = 0
        self.behind: dict[Sequence, int] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing goes there or waits to go."""
        return not self.num_streams and not self.behind

    def rest(self) -> StreamBatch | None:
        """All that has not gone, as one batch; None when nothing is behind."""
        if not self.behind:
            return None
        batch = StreamBatch(
            target=self,
            sequences=list(self.behind),
            stream_ids=[sequence.stream_id for sequence in self.behind],
            first_positions=list(self.behind.values()),
            token_ids=[],
        )
        for sequence, position in self.behind.items():
            tokens = sequence.output_from(position)
            batch.num_tokens.append(len(tokens))
            batch.token_ids.extend(tokens)
        batch.has_logprobs = any(sequence.tells for sequence in self.behind)
        if any(sequence.num_cached_tokens for sequence in self.behind):
            batch.num_cached_tokens = [sequence.num_cached_tokens for sequence in self.behind]
        batch.mark_finished()
        return batch


class Outbox:
    """All targets, and the finished sequences that are kept because their output has not gone."""

    def __init__(self, *, linger_s: float) -> None:
        self._linger_ns = int(linger_s * 1e9)
        self._targets: dict[tuple[str, int], Target] = {}
        self._kept: dict[str, Sequence] = {}

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._targets.values()))

    @property
    def num_kept(self) -> int:
        """Finished sequences whose output has not gone."""
        return len(self._kept)

    def target(self, address: str, incarnation: int) -> Target:
        """The target of that name, made where it is new."""
        key = (address, incarnation)
        found = self._targets.get(key)
        if found is None:
            found = self._targets[key] = Target(address, incarnation)
        return found

    def attach(self, sequence: Sequence) -> None:
        """A sequence's tokens go to its target from now on."""
        # The target may have been forgotten between its making and this.
        self._targets.setdefault((sequence.target.address, sequence.target.incarnation), sequence.target)
        sequence.target.num_streams += 1

    def detach(self, sequence: Sequence) -> None:
        """A live sequence ended without a finish to tell: what has not gone never will."""
        sequence.target.num_streams -= 1
        sequence.target.behind.pop(sequence, None)
        self._forget_if_idle(sequence.target)

    def finish(self, sequence: Sequence) -> None:
        """A live sequence ended with its output; what is behind of it still shall go."""
        sequence.target.num_streams -= 1
        if sequence in sequence.target.behind:
            self._kept[sequence.request_id] = sequence

    def hold(self, batch: StreamBatch) -> None:
        """A batch could not be sent: its streams are behind from here, if they were not before."""
        behind = batch.target.behind
        for sequence, position in zip(batch.sequences, batch.first_positions, strict=True):
            if sequence.status is Status.FINISHED:
                # Nobody waits for the output of one that has been aborted since.
                if not sequence.has_final_output:
                    continue
                self._kept[sequence.request_id] = sequence
            behind.setdefault(sequence, position)
        self._targets.setdefault((batch.target.address, batch.target.incarnation), batch.target)

    def sent(self, target: Target) -> None:
        """The rest of a target has gone."""
        for sequence in target.behind:
            self._drop_kept(sequence)
        target.behind.clear()
        self._forget_if_idle(target)

    def redirect(self, sequence: Sequence, target: Target, from_position: int) -> None:
        """Send a sequence's output, live or kept, to another target, from a position on."""
        former = sequence.target
        former.behind.pop(sequence, None)
        if sequence.status is not Status.FINISHED:
            former.num_streams -= 1
            target.num_streams += 1
        sequence.target = target
        if from_position < sequence.num_output_tokens or sequence.finish_reason:
            target.behind[sequence] = from_position
        self._targets.setdefault((target.address, target.incarnation), target)
        self._forget_if_idle(former)

    def kept(self, request_id: str) -> Sequence | None:
        """A finished sequence whose output has not gone, or None."""
        return self._kept.get(request_id)

    def drop_kept(self, request_id: str) -> None:
        """Nobody wants the rest of a finished sequence's output any more."""
        sequence = self._kept.pop(request_id, None)
        if sequence is not None:
            sequence.target.behind.pop(sequence, None)
            self._forget_if_idle(sequence.target)

    def drop_owner(self, owner: int) -> None:
        """A router is gone: nobody waits for the output of its finished sequences."""
        for sequence in [kept for kept in self._kept.values() if kept.owner == owner]:
            self.drop_kept(sequence.request_id)

    def drop_lingering(self, now_ns: int) -> None:
        """Drop finished sequences whose output could not be sent for too long."""
        for sequence in [kept for kept in self._kept.values() if now_ns - kept.finished_ns >= self._linger_ns]:
            self.drop_kept(sequence.request_id)
        # Named by a request that was then refused.
        for target in self:
            self._forget_if_idle(target)

    def _drop_kept(self, sequence: Sequence) -> None:
        # A new request of the same id may be kept in its place.
        if self._kept.get(sequence.request_id) is sequence:
            del self._kept[sequence.request_id]

    def _forget_if_idle(self, target: Target) -> None:
        if target.is_idle:
            self._targets.pop((target.address, target.incarnation), None)
