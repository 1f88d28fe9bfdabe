"""What a gateway is told of the caches is what the lanes hold, whoever is slow and whichever lane comes or goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.kv_mirror import PENDING_MAX, AllCleared, BlockRemoved, BlockStored, Change, KvMirror, KvReader
from services.router.prefix_directory import CLEARED, REMOVED, STORED, LaneNews, namespace_hash

PAGE = 2
START = namespace_hash("")


def tokens_of(block: int) -> bytes:
    return block.to_bytes(8, "little")


def stored(lane: int, chain: list[int], before: int = START, *, is_snapshot: bool = False) -> LaneNews:
    tokens = b"".join(tokens_of(block) for block in chain)
    return LaneNews(lane, PAGE, 0, ((STORED, tuple(chain)),), is_snapshot, True, (before,), tokens)


def event(lane: int, kind: int, blocks: tuple[int, ...] = ()) -> LaneNews:
    return LaneNews(lane, PAGE, 0, ((kind, blocks),), False, True, (0,), b"")


class Gateway:
    """Knows what it was told."""

    def __init__(self, mirror: KvMirror) -> None:
        self.num_wakes = 0
        self.blocks: dict[int, int | None] = {}
        self.reader: KvReader = mirror.open(self._wake)

    def _wake(self) -> None:
        self.num_wakes += 1

    def read(self) -> list[Change]:
        found: list[Change] = []
        while changes := self.reader.take():
            found += changes
        for change in found:
            match change:
                case BlockStored():
                    assert change.block not in self.blocks
                    assert change.before is None or change.before in self.blocks
                    assert change.tokens == tokens_of(change.block)
                    self.blocks[change.block] = change.before
                case BlockRemoved():
                    del self.blocks[change.block]
                case AllCleared():
                    self.blocks.clear()
        return found


def test_a_block_goes_when_the_last_lane_gives_it_up() -> None:
    mirror = KvMirror()
    gateway = Gateway(mirror)
    mirror.update(1, stored(10, [1, 2]))
    mirror.update(2, stored(20, [1, 2, 3]))
    gateway.read()
    assert gateway.blocks == {1: None, 2: 1, 3: 2}
    assert gateway.num_wakes == 3
    mirror.update(1, event(10, REMOVED, (2,)))
    assert gateway.read() == []
    mirror.update(2, event(20, REMOVED, (2, 3)))
    assert {change.block for change in gateway.read() if isinstance(change, BlockRemoved)} == {2, 3}
    mirror.forget(2)
    assert gateway.read() == []
    mirror.update(1, event(10, CLEARED))
    assert gateway.read() == [BlockRemoved(1)]


def test_a_snapshot_takes_nothing_away_that_it_brings_again() -> None:
    mirror = KvMirror()
    gateway = Gateway(mirror)
    mirror.update(1, stored(10, [1, 2]))
    gateway.read()
    mirror.update(1, stored(10, [1, 4], is_snapshot=True))
    assert gateway.read() == [BlockStored(4, 1, tokens_of(4)), BlockRemoved(2)]
    mirror.update(1, LaneNews(10, 0, 0, (), True, True))
    gateway.read()
    assert gateway.blocks == {}


def test_prefixes_of_a_namespace_are_not_told() -> None:
    mirror = KvMirror()
    gateway = Gateway(mirror)
    mirror.update(1, stored(10, [1, 2], before=namespace_hash("salt")))
    mirror.update(1, event(10, REMOVED, (2,)))
    assert gateway.read() == []


def test_a_late_reader_begins_with_everything_and_a_slow_one_begins_anew() -> None:
    mirror = KvMirror()
    first = Gateway(mirror)
    mirror.update(1, stored(10, [1, 2]))
    late = Gateway(mirror)
    late.read()
    assert late.blocks == {1: None, 2: 1}
    for _ in range(PENDING_MAX):
        mirror.update(1, stored(10, [3], before=2))
        mirror.update(1, event(10, REMOVED, (3,)))
    assert AllCleared() in first.read()
    assert first.blocks == late.blocks
    mirror.close(first.reader)
    mirror.close(late.reader)
    assert not mirror.has_readers
    assert mirror.num_blocks == 0


CHAINS = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [4], 5: [4, 5]}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["store", "remove", "clear", "forget", "read", "join"]), st.integers(1, 3), st.integers(1, 5)),
        max_size=40,
    )
)
def test_readers_know_what_some_lane_holds(operations: list[tuple[str, int, int]]) -> None:
    mirror = KvMirror()
    gateways = [Gateway(mirror)]
    lanes: dict[int, set[int]] = {}
    for name, lane, block in operations:
        held = lanes.setdefault(lane, set())
        if name == "store":
            chain = [one for one in CHAINS[block] if one not in held]
            if chain:
                at = CHAINS[block].index(chain[0])
                mirror.update(lane, stored(0, chain, before=CHAINS[block][at - 1] if at else START))
                held |= set(chain)
        elif name == "remove":
            gone = tuple(sorted(one for one in held if block in CHAINS[one]))
            mirror.update(lane, event(0, REMOVED, gone))
            held -= set(gone)
        elif name == "clear":
            mirror.update(lane, event(0, CLEARED))
            held.clear()
        elif name == "forget":
            mirror.forget(lane)
            held.clear()
        elif name == "join":
            gateways.append(Gateway(mirror))
        else:
            gateways[0].read()
    expected = set().union(*lanes.values())
    for gateway in gateways:
        gateway.read()
        assert set(gateway.blocks) == expected
