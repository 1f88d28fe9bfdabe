"""Each policy's order, and what all of them must keep."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.config import Settings
from services.scheduler.lane import Lane
from services.scheduler.lanes import Lanes
from services.scheduler.policies import by_prefix
from services.scheduler.policies.policy import Policy
from services.scheduler.policies.registry import POLICIES
from services.scheduler.sequence import Sequence
from tests.unit.scheduler import builders

CORE = builders.scheduler()


def make(name: str, cached: list[list[int]] = ()) -> tuple[Policy, Lanes]:  # type: ignore[assignment]
    """A policy over one lane with these prefixes in its cache, a token a page."""
    lanes = Lanes()
    lane = Lane(1, builders.capacity(num_pages=64, page_size=1))
    lanes.add(lane)
    for tokens in cached:
        lane.kv.tree.insert(array("i", tokens).tobytes(), lane.kv.allocate(len(tokens)) or [])
    return POLICIES[name](lanes), lanes


def order(policy: Policy) -> list[str]:
    """Take all out, the next one first."""
    names = []
    while (sequence := policy.peek()) is not None:
        assert policy.peek() is sequence, "a look must not change the order"
        names.append(sequence.request_id)
        policy.remove(sequence)
    assert len(policy) == 0
    return names


def sequence(name: str, tokens: list[int] | None = None, max_tokens: int | None = 8) -> Sequence:
    return builders.sequence(CORE, name, tokens or [1, 2, 3], max_tokens=max_tokens)


def fill(policy: Policy, sequences: list[Sequence]) -> Policy:
    for one in sequences:
        policy.add(one)
    return policy


def test_settings_offer_every_policy() -> None:
    assert Settings.model_fields["policy"].annotation.__args__ == tuple(POLICIES)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
def test_each_sequence_comes_out_once_whatever_leaves_between(name: str, data: st.DataObject) -> None:
    policy, _ = make(name, [[1, 2, 3]])
    held: dict[str, Sequence] = {}
    for index in range(data.draw(st.integers(1, 20))):
        if held and data.draw(st.booleans()):
            policy.remove(held.pop(data.draw(st.sampled_from(sorted(held)))))
        one = sequence(str(index), data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)), data.draw(st.integers(1, 3)))
        held[one.request_id] = one
        policy.add(one)
        assert policy.peek() in held.values()
        assert len(policy) == len(held) == len(set(policy))
    assert sorted(order(policy)) == sorted(held)


def test_fcfs_is_the_order_of_arrival() -> None:
    policy, _ = make("fcfs", [[1, 2, 3]])
    assert order(fill(policy, [sequence("a", [9]), sequence("b"), sequence("c", [1, 2])])) == ["a", "b", "c"]


def test_lof_begins_with_who_may_say_most() -> None:
    policy, _ = make("lof")
    waiting = [
        sequence("2", max_tokens=2),
        sequence("endless", max_tokens=None),
        sequence("9", max_tokens=9),
        sequence("2b", max_tokens=2),
    ]
    assert order(fill(policy, waiting)) == ["endless", "9", "2", "2b"]


def test_random_is_not_the_order_of_arrival_and_lets_nobody_wait_by_its_name() -> None:
    firsts = set()
    policy, _ = make("random")
    for _ in range(60):
        firsts.add(order(fill(policy, [sequence(name) for name in "abc"]))[0])
    assert firsts == {"a", "b", "c"}


def test_lpm_begins_with_the_longest_cached_prefix() -> None:
    policy, _ = make("lpm", [[1, 2, 3, 4], [7, 8]])
    waiting = [
        sequence("none", [9, 9]),
        sequence("two", [7, 8, 9]),
        sequence("none-either", [5, 5]),
        sequence("three", [1, 2, 3, 9]),
        sequence("two-later", [1, 2, 9]),
    ]
    assert order(fill(policy, waiting)) == ["three", "two", "two-later", "none", "none-either"]


def test_lpm_sees_what_is_cached_meanwhile() -> None:
    policy, lanes = make("lpm", [[1, 2]])
    fill(policy, [sequence("one", [1, 2, 3]), sequence("other", [5, 6, 7, 8])])
    assert policy.peek().request_id == "one"  # type: ignore[union-attr]
    lane = next(iter(lanes))
    lane.kv.tree.insert(array("i", [5, 6, 7]).tobytes(), lane.kv.allocate(3) or [])
    assert order(policy) == ["other", "one"]


def test_lpm_sees_a_lane_that_is_lost() -> None:
    policy, lanes = make("lpm", [[5, 6]])
    fill(policy, [sequence("one", [1, 2, 3]), sequence("other", [5, 6, 7])])
    assert policy.peek().request_id == "other"  # type: ignore[union-attr]
    lanes.remove(1)
    assert order(policy) == ["one", "other"]


def test_dfs_weight_serves_the_heaviest_branch_whole() -> None:
    policy, _ = make("dfs-weight", [[1, 2, 3], [1, 2, 4], [7, 8, 9]])
    waiting = [
        sequence("none", [5, 5]),
        sequence("7", [7, 8, 9, 1]),
        sequence("12", [1, 2, 9]),
        sequence("124", [1, 2, 4, 1]),
        sequence("123", [1, 2, 3, 1]),
        sequence("123b", [1, 2, 3, 2]),
    ]
    # The branch of 1, 2 has four, its child 3 has two of them; a node's own come after its children.
    assert order(fill(policy, waiting)) == ["123", "123b", "124", "12", "7", "none"]


@pytest.mark.parametrize("name", ["lpm", "dfs-weight"])
def test_nobody_is_overtaken_for_ever(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_prefix, "OVERTAKEN_MAX", 5)
    policy, _ = make(name, [[1, 2, 3]])
    fill(policy, [sequence("unlucky", [9, 9])])
    served = []
    for index in range(20):
        policy.add(sequence(f"lucky{index}", [1, 2, 3, 4]))
        head = policy.peek()
        assert head is not None
        served.append(head.request_id)
        policy.remove(head)
    assert served.index("unlucky") == 5


@pytest.mark.parametrize("name", ["lpm", "dfs-weight"])
def test_only_the_oldest_are_ordered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_prefix, "WINDOW", 2)
    policy, _ = make(name, [[1, 2, 3]])
    fill(policy, [sequence("a", [9, 9]), sequence("b", [9, 8]), sequence("c", [1, 2, 3, 4])])
    assert order(policy) == ["a", "b", "c"]
