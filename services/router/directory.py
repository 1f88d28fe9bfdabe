"""Who is there: every registered instance, what it offers, how loaded it is, whether it moves.

Pure: fed by the back-plane's events, asked by requests for a place and by /ready for what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.router.generation import EngineLoad, ModelOffer
from services.router.known_models import KnownModels
from services.router.places import DETOKENIZER, SCHEDULER, STAGE_NAMES, TOKENIZER, LookUp
from services.router.policies.choice import Candidate, Policy
from services.router.prefix_directory import PrefixDirectory


@dataclass(frozen=True, slots=True)
class Report:
    """What a heartbeat says."""

    num_running: int
    num_waiting: int
    num_steps: int
    last_step_unix_ns: int
    oldest_waiting_age_ns: int
    is_draining: bool
    models: tuple[ModelOffer, ...]
    num_waiting_tokens: int = 0
    max_num_seqs: int = 0
    num_kv_tokens: int = 0
    kv_usage: float = 0.0


NOTHING_REPORTED = Report(0, 0, 0, 0, 0, is_draining=False, models=())


@dataclass(slots=True)
class Instance:
    """One registered process life."""

    role: int
    incarnation: int
    name: str
    address: str
    models: dict[str, ModelOffer] = field(default_factory=dict)
    is_draining: bool = False
    num_reported: int = 0
    num_open: int = 0
    num_open_at_report: int = 0
    num_taken: int = 0
    heard_ns: int = 0
    num_steps: int = 0
    moved_ns: int = 0
    last_step_unix_ns: int = 0
    oldest_waiting_age_ns: int = 0
    report: Report = NOTHING_REPORTED

    @property
    def load(self) -> int:
        """What it reported last, corrected by what we gave it and got back since."""
        return max(0, self.num_reported + self.num_open - self.num_open_at_report)


class Directory:
    """The instances of the three stages a router talks to."""

    def __init__(self, policy: Policy, *, stuck_after_ns: int, is_cache_aware: bool = True, models_complete_ns: int = 0) -> None:
        """`models_complete_ns` is when everybody has had time to register: see `KnownModels`."""
        self.prefixes = PrefixDirectory()
        self.is_cache_aware = is_cache_aware
        self._policy = policy
        self._stuck_after_ns = stuck_after_ns
        self._instances: dict[int, Instance] = {}
        self.known_models = KnownModels(models_complete_ns)

    def add(self, instance: Instance, now_ns: int) -> None:
        """An instance registered."""
        instance.heard_ns = instance.moved_ns = now_ns
        # A newcomer joins the turn where the others are, instead of getting everything until it has caught up.
        peers = [other.num_taken for other in self._of(instance.role)]
        instance.num_taken = min(peers, default=0)
        self._instances[instance.incarnation] = instance
        self.known_models.learn(instance.models.values())

    def remove(self, incarnation: int) -> None:
        """An instance is gone."""
        self._instances.pop(incarnation, None)
        self.prefixes.forget(incarnation)

    def report(self, incarnation: int, report: Report, now_ns: int) -> bool:
        """A heartbeat came; True when the instance can take more kinds of work than before."""
        instance = self._instances.get(incarnation)
        if instance is None:
            return False
        num_work = report.num_running + report.num_waiting
        if report.num_steps != instance.num_steps or num_work == 0:
            instance.moved_ns = now_ns
        instance.heard_ns, instance.num_steps, instance.report = now_ns, report.num_steps, report
        instance.last_step_unix_ns, instance.oldest_waiting_age_ns = report.last_step_unix_ns, report.oldest_waiting_age_ns
        instance.num_reported, instance.num_open_at_report = num_work, instance.num_open
        models = {offer.name: offer for offer in report.models}
        has_more = not models.keys() <= instance.models.keys() or (instance.is_draining and not report.is_draining)
        instance.models, instance.is_draining = models, report.is_draining
        self.known_models.learn(report.models)
        return has_more

    def get(self, incarnation: int) -> Instance | None:
        """The instance with that incarnation."""
        return self._instances.get(incarnation)

    def take(
        self, role: int, model: str, *, avoid: int | None, prompt: LookUp | None = None, near: int | None = None
    ) -> int | None:
        """Choose an instance for a piece of work and count it there.

        `near` is it if it can serve. Among schedulers that are not much busier than the least busy one, those that have most of the
        prompt cached come first.
        """
        candidates = [instance for instance in self._serving(role, model) if instance.incarnation != avoid]
        candidates = [instance for instance in candidates if instance.incarnation == near] or candidates
        if not candidates:
            return None
        if prompt is not None and self.is_cache_aware and len(candidates) > 1:
            best = self.prefixes.with_most_cached({one.incarnation: one.load for one in candidates}, prompt())
            candidates = [one for one in candidates if one.incarnation in best]
        chosen = candidates[0]
        if len(candidates) > 1:
            chosen = candidates[self._policy([Candidate(instance.load, instance.num_taken) for instance in candidates])]
        chosen.num_open += 1
        chosen.num_taken += 1
        return chosen.incarnation

    def give_back(self, incarnation: int) -> None:
        """A piece of work is over."""
        instance = self._instances.get(incarnation)
        if instance is not None and instance.num_open > 0:
            instance.num_open -= 1

    def resolve_model(self, name: str, now_ns: int, *, embeds: bool | None = None) -> str:
        """The model that a request means; see `KnownModels.resolve`."""
        return self.known_models.resolve(name, now_ns, embeds=embeds)

    def incarnations(self, role: int) -> list[int]:
        """Those of a stage's instances."""
        return [instance.incarnation for instance in self._of(role)]

    def offers(self) -> list[ModelOffer]:
        """Models that schedulers can serve now, by name."""
        found: dict[str, ModelOffer] = {}
        for instance in self._of(SCHEDULER):
            if not instance.is_draining:
                found |= instance.models
        return [found[name] for name in sorted(found)]

    def not_ready_reason(self, now_ns: int) -> str | None:
        """Which stage is missing or stuck; None when some model could be served now."""
        for role in (TOKENIZER, SCHEDULER, DETOKENIZER):
            instances = self._of(role)
            name = STAGE_NAMES[role]
            if not instances:
                return f"no {name} is registered"
            if all(instance.is_draining for instance in instances):
                return f"every {name} is draining"
            if not any(instance.models for instance in instances if not instance.is_draining):
                hint = "; has its worker loaded the model?" if role == SCHEDULER else ""
                return f"no {name} offers a model yet{hint}"
            if all(self._is_stuck(instance, now_ns) for instance in instances):
                return f"every {name} is stuck: it has work and has finished no step for {self._stuck_after_ns / 1e9:g} s"
        if not any(self._is_served(offer.name) for offer in self.offers()):
            return "no model is offered by a tokenizer, a scheduler and a detokenizer at once"
        return None

    def stages(self, now_ns: int, now_unix_ns: int) -> dict[str, object]:
        """What /health tells of every instance. Ages are in seconds."""
        return {
            name: [
                {
                    "instance": instance.name,
                    "draining": instance.is_draining,
                    "stuck": self._is_stuck(instance, now_ns),
                    "models": sorted(instance.models),
                    "open": instance.num_open,
                    "reported_load": instance.num_reported,
                    "last_heartbeat_age_s": round((now_ns - instance.heard_ns) / 1e9, 3),
                    "last_step_age_s": _age_s(instance.last_step_unix_ns, now_unix_ns),
                    "oldest_waiting_age_s": round(instance.oldest_waiting_age_ns / 1e9, 3),
                }
                for instance in self._of(role)
            ]
            for role, name in STAGE_NAMES.items()
        }

    def _of(self, role: int) -> list[Instance]:
        return [instance for instance in self._instances.values() if instance.role == role]

    def _serving(self, role: int, model: str) -> Iterable[Instance]:
        return (
            instance
            for instance in self._instances.values()
            if instance.role == role and not instance.is_draining and model in instance.models
        )

    def _is_served(self, model: str) -> bool:
        return all(any(True for _ in self._serving(role, model)) for role in STAGE_NAMES)

    def _is_stuck(self, instance: Instance, now_ns: int) -> bool:
        return instance.num_reported > 0 and now_ns - instance.moved_ns >= self._stuck_after_ns


def _age_s(then_unix_ns: int, now_unix_ns: int) -> float | None:
    return round(max(0, now_unix_ns - then_unix_ns) / 1e9, 3) if then_unix_ns else None


def engine_load(directory: Directory) -> EngineLoad:
    """How busy all schedulers together are."""
    instances = [directory.get(incarnation) for incarnation in directory.incarnations(SCHEDULER)]
    reports = [instance.report for instance in instances if instance is not None]
    return EngineLoad(
        num_running=sum(report.num_running for report in reports),
        num_waiting=sum(report.num_waiting for report in reports),
        num_waiting_tokens=sum(report.num_waiting_tokens for report in reports),
        max_num_seqs=sum(report.max_num_seqs for report in reports),
        num_kv_tokens=sum(report.num_kv_tokens for report in reports),
        num_used_tokens=round(sum(report.num_kv_tokens * report.kv_usage for report in reports)),
    )
