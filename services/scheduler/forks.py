"""Which sequences can fork from which: choices of one request have one prompt, and it is computed once.

The first of a group that a lane takes computes the prompt. The others wait aside for it (`entrance.py`), then enter beside it: they
share its full pages through the radix tree and get copies of the pages that cannot be shared, the last one as a rule. Only the
prompt's last token is computed again for each, for the sake of the logits that its own draw is made from.
"""

from __future__ import annotations

from services.scheduler.sequence import Sequence


class Forks:
    """The groups of which a lane has taken a sequence."""

    def __init__(self) -> None:
        self._members: dict[str, dict[Sequence, None]] = {}
        self._num_groups_max = 64

    def entered(self, sequence: Sequence) -> None:
        """A lane has taken a sequence."""
        if not sequence.fork_group:
            return
        self._members.setdefault(sequence.fork_group, {})[sequence] = None
        if len(self._members) > self._num_groups_max:
            for group in list(self._members):
                self._running(group)
            self._num_groups_max = 64 + 2 * len(self._members)

    def sources(self, sequence: Sequence) -> list[Sequence]:
        """Running sequences from which one that waits can fork, now or when their prompt is computed."""
        if not sequence.fork_group:
            return []
        return [source for source in self._running(sequence.fork_group) if _can_fork(source, sequence)]

    def _running(self, group: str) -> list[Sequence]:
        members = self._members.get(group, {})
        running = [member for member in members if member.lane is not None]
        if running:
            self._members[group] = dict.fromkeys(running)
        else:
            self._members.pop(group, None)
        return running


def _can_fork(source: Sequence, sequence: Sequence) -> bool:
    lane = source.lane
    assert lane is not None
    return (
        (lane.capacity.copies_pages or lane.kv.keeps_prefixes)
        and lane.kv.is_current(source)
        and source.namespace == sequence.namespace
        # They say that they are of one group; that is looked at, for nobody may get another's prompt by it.
        and source.tokens[: sequence.num_tokens] == sequence.tokens
    )
