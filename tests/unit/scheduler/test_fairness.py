"""Goal: under `fair`, tenants with work are served alike, however much each sends, and nobody saves up by idling."""

from __future__ import annotations

from typing import Any

from services.scheduler.policies.fair import INPUT_WEIGHT, OUTPUT_WEIGHT, FairOverTenants
from services.scheduler.sequence import Sequence
from tests.unit.scheduler import builders
from tests.unit.scheduler.system import System


class World:
    """A lane of few slots, so that a queue forms."""

    def __init__(self, policy: str = "fair") -> None:
        self.system = System(builders.scheduler(policy=policy))
        self.site = self.system.join(builders.capacity(num_pages=256, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256))
        self.sequences: list[Sequence] = []

    def submit(self, tenant: str, *, num_tokens: int = 6, max_tokens: int = 8) -> Sequence:
        name = f"{tenant}-{len(self.sequences)}"
        sequence = builders.sequence(self.system.core, name, [len(self.sequences) % 40] * num_tokens, max_tokens=max_tokens)
        sequence.tenant = tenant
        self.sequences.append(sequence)
        self.system.submit(sequence)
        return sequence

    def step(self) -> None:
        self.system.now_ns += 1_000_000
        self.system.deliver_result(self.site)
        self.system.plan_all()

    def served(self, tenant: str) -> int:
        """Tokens, weighted, that a tenant has got."""
        return sum(
            INPUT_WEIGHT * sequence.num_prompt_tokens + OUTPUT_WEIGHT * sequence.num_output_tokens
            for sequence in self.sequences
            if sequence.tenant == tenant and sequence.num_admissions
        )


def served_while_both_have_work(policy: str, **loads: dict[str, Any]) -> tuple[int, int]:
    """`many` sends ten requests for each of `few`, who always has two waiting."""
    world = World(policy)
    for _ in range(100):
        world.submit("many", **loads.get("many", {}))
    for _ in range(400):
        num_waiting = sum(sequence.tenant == "few" for sequence in world.system.core.queue)
        for _ in range(2 - num_waiting):
            world.submit("few", **loads.get("few", {}))
        num_waiting = sum(sequence.tenant == "many" for sequence in world.system.core.queue)
        for _ in range(20 - num_waiting):
            world.submit("many", **loads.get("many", {}))
        world.step()
    return world.served("many"), world.served("few")


def test_ten_times_the_load_gets_no_more() -> None:
    many, few = served_while_both_have_work("fair")
    assert abs(many - few) < 0.1 * max(many, few)
    many, few = served_while_both_have_work("fcfs")
    assert many > 3 * few, "without fairness the same load is served very differently"


def test_long_requests_count_for_what_they_are() -> None:
    many, few = served_while_both_have_work("fair", few={"num_tokens": 40, "max_tokens": 30})
    assert abs(many - few) < 0.1 * max(many, few)


def test_idling_earns_no_credit() -> None:
    world = World()
    for _ in range(60):
        world.submit("busy")
    for _ in range(60):
        world.step()
    served_before = world.served("busy")
    assert served_before > 200
    for _ in range(60):
        world.submit("late")
    for _ in range(60):
        world.step()
    # From now on each gets half; with credit for its idle time `late` would have got all.
    late, busy = world.served("late"), world.served("busy") - served_before
    assert abs(late - busy) < 0.35 * max(late, busy)
    assert busy > 0


def test_a_tenants_own_requests_keep_their_order() -> None:
    policy = FairOverTenants()
    core = builders.scheduler()
    names = []
    for name in ("a1", "b1", "a2", "a3"):
        sequence = builders.sequence(core, name)
        sequence.tenant = name[0]
        policy.add(sequence)
    while (head := policy.peek()) is not None:
        names.append(head.request_id)
        policy.remove(head)
        head.num_admissions = 1
    # Each admission counts three input tokens.
    assert names == ["a1", "b1", "a2", "a3"]
    assert (policy.served("a"), policy.served("b")) == (9, 3)


def test_what_has_ended_is_let_go() -> None:
    world = World()
    for tenant in ("a", "b"):
        for _ in range(5):
            world.submit(tenant)
    world.system.core.abort([world.sequences[7].request_id], world.system.now_ns)
    world.system.run()
    policy = world.system.core.queue._policy
    assert isinstance(policy, FairOverTenants)
    world.submit("c")
    assert set(policy._busy) == {"c"}
    assert len(policy._running) <= 1
    assert policy.served("a") == 5 * (6 * INPUT_WEIGHT + 8 * OUTPUT_WEIGHT)
