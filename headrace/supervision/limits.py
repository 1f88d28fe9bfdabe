"""The supervisor's numbers and what a process to be supervised is. Plain frozen data, checked once, read everywhere here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from headrace.errors import ConfigError


@dataclass(frozen=True)
class SupervisionLimits:
    """Deadlines, backoff and bounds of one supervisor. `ProcessSpec` can override some for one process."""

    backoff_initial_s: float = 0.1
    """Delay before the first restart, seconds; doubled for each restart after that."""
    backoff_max_s: float = 30.0
    """The delay grows no further than this, seconds."""
    crash_loop_restarts: int = 8
    """This many restarts within `crash_loop_window_s` are allowed; the next one stops the whole tree."""
    crash_loop_window_s: float = 120.0
    """Length of the crash loop window, seconds."""
    healthy_after_s: float = 30.0
    """A process that stayed started for this long gets the initial backoff again, seconds."""
    start_timeout_s: float = 60.0
    """From spawn, or from the last progress made while starting, to the `started` message, seconds."""
    stall_timeout_s: float = 30.0
    """Default for processes that report progress: silence or a standstill while busy longer than this is a stall, seconds."""
    drain_deadline_s: float = 30.0
    """From SIGTERM to the process alone until its whole group gets SIGTERM, seconds."""
    term_deadline_s: float = 5.0
    """From SIGTERM to the group until SIGKILL to the group, seconds."""
    stderr_tail_lines: int = 40
    """Lines of a child's stderr that are kept for its exit reason."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value > 0:
                raise ConfigError(f"{item.name} must be greater than 0, got {value}", param=item.name)
        if self.backoff_max_s < self.backoff_initial_s:
            raise ConfigError(
                f"backoff_max_s must be at least backoff_initial_s ({self.backoff_initial_s}), got {self.backoff_max_s}",
                param="backoff_max_s",
            )


@dataclass(frozen=True)
class ProcessSpec:
    """One process to keep running."""

    name: str
    """Unique in its supervisor; names the process in logs and errors. No `/`."""
    argv: Sequence[str]
    """Program and arguments; the program is found in PATH."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the supervisor's own environment."""
    start_after: tuple[str, ...] = ()
    """Names that must have said `started` before this one is spawned. Stopping goes in the reverse order."""
    stop_before: tuple[str, ...] = ()
    """Names that are stopped only when this one has ended, although they may start at any time."""
    start_timeout_s: float | None = None
    """Overrides the limit of the same name."""
    stall_timeout_s: float | None = None
    """None: progress is not watched. Else silence of a process that once reported progress is a stall after this, seconds."""
    restart: Literal["always", "never"] = "always"
    """`never`: the death of this process ends the whole tree."""
    drain_deadline_s: float | None = None
    """Overrides the limit of the same name."""
    has_standby: bool = False
    """Keep the next life ready beside the running one; for programs that call `Attachment.wait_turn`."""
    pass_fds: tuple[int, ...] = ()
    """Open descriptors that the process inherits."""


def check_specs(specs: Sequence[ProcessSpec]) -> None:
    """Refuse specs that could never all start.

    Raises:
        ConfigError: No spec at all, a name twice or with `/`, an unknown name in `start_after` or `stop_before`, or a cycle.
    """
    if not specs:
        raise ConfigError("there is no process to supervise")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"process name {name!r} is used twice", param="name")
        if not name or "/" in name:
            raise ConfigError(f"process name {name!r} must not be empty or contain '/'", param="name")
    for spec in specs:
        for option in ("start_after", "stop_before"):
            for other in getattr(spec, option):
                if other not in names:
                    raise ConfigError(
                        f"{option} of {spec.name} holds {other!r}, which is not among: {', '.join(names)}", param=option
                    )
    _refuse_cycle("start_after", {spec.name: set(spec.start_after) for spec in specs})
    _refuse_cycle("start_after and stop_before", {spec.name: {*spec.start_after, *spec.stop_before} for spec in specs})


def _refuse_cycle(option: str, needed: Mapping[str, set[str]]) -> None:
    reached: set[str] = set()
    while len(reached) < len(needed):
        more = {name for name in needed if name not in reached and reached.issuperset(needed[name])}
        if not more:
            raise ConfigError(f"{option} makes a cycle among: {', '.join(sorted(needed.keys() - reached))}", param="start_after")
        reached |= more
