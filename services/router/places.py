"""Where one request is held: which instance of each stage has it, which to avoid, and what is waited for. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from headrace.v1 import control_pb2 as control
from services.router.prefix_directory import CachePrompt

TOKENIZER, SCHEDULER, DETOKENIZER = control.ROLE_TOKENIZER, control.ROLE_SCHEDULER, control.ROLE_DETOKENIZER
STAGE_NAMES: dict[int, str] = {TOKENIZER: "tokenizer", SCHEDULER: "scheduler", DETOKENIZER: "detokenizer"}


LookUp = Callable[[], CachePrompt]
"""Gives what is to be looked up in the caches; called only where there is a choice."""


class Placement(Protocol):
    """Chooses instances and counts what they hold for us."""

    def take(
        self, role: int, model: str, *, avoid: int | None, prompt: LookUp | None = None, near: int | None = None
    ) -> int | None:
        """Choose an instance that can serve the model, `near` if it can; count one piece of work on it. None when there is none."""
        ...

    def give_back(self, incarnation: int) -> None:
        """One piece of work on the instance is over; unknown instances are ignored."""
        ...


class Places:
    """The instances that hold one request, by role."""

    def __init__(self, placement: Placement, model: str, *, move_delay_ns: int) -> None:
        self.held: dict[int, int] = {}
        self.waiting_for: int | None = None
        self.waiting_since_ns = 0
        self.retry_at_ns: int | None = None
        self._placement = placement
        self._model = model
        self._move_delay_ns = move_delay_ns
        self._avoid: dict[int, tuple[int, int]] = {}

    def take(self, role: int, now_ns: int, prompt: LookUp | None = None, *, near: int | None = None) -> bool:
        """Find a place at a stage: `near` if it can be, else best one that has most of a prompt cached.

        False starts, or goes on with, a wait for one.
        """
        avoid, until_ns = self._avoid.get(role, (None, 0))
        chosen = self._placement.take(role, self._model, avoid=avoid, prompt=prompt, near=near)
        if chosen is None and avoid is not None:
            if now_ns >= until_ns:
                chosen = self._placement.take(role, self._model, avoid=None, prompt=prompt, near=near)
            else:
                self.retry_at_ns = until_ns
        if chosen is None:
            if self.waiting_for != role:
                self.waiting_for, self.waiting_since_ns = role, now_ns
            return False
        self.waiting_for = None
        self._avoid.pop(role, None)
        self.held[role] = chosen
        return True

    def leave(self, role: int, now_ns: int) -> None:
        """Give a place up, and prefer another instance next time."""
        incarnation = self.drop(role)
        if incarnation is not None:
            self._avoid[role] = (incarnation, now_ns + self._move_delay_ns)

    def drop(self, role: int) -> int | None:
        """Give a place up without a grudge."""
        incarnation = self.held.pop(role, None)
        if incarnation is not None:
            self._placement.give_back(incarnation)
        return incarnation

    def drop_all(self) -> None:
        """The request is over."""
        self.waiting_for = None
        for role in list(self.held):
            self.drop(role)
