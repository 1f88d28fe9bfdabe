"""The six workloads that servers are compared on, and the requests of one run of each. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.peers import texts
from bench.peers.texts import CountTokens


@dataclass(frozen=True)
class Script:
    """What one client sends, one request after the other: each prompt is all that was said before, and then what the user adds."""

    index: int
    user_texts: tuple[str, ...]
    num_output_tokens: int


@dataclass(frozen=True)
class Workload:
    """A closed loop: `num_clients` clients, each with one request open, until `num_scripts` scripts have been played."""

    name: str
    title: str
    num_clients: int
    num_scripts: int
    num_prompt_tokens: int
    """Of a script's first prompt, the shared ones included."""
    num_output_tokens: int
    """Of each request, exactly."""
    make: Callable[[Workload, random.Random, str, CountTokens], tuple[str, ...]]
    """A script's user texts, from its random numbers and what its run shares."""
    num_shared_tokens: int = 0
    num_turns: int = 1
    num_turn_tokens: int = 0
    """What a user adds in each further turn."""
    repeats_input: bool = False

    def num_scripts_at(self, scale: float) -> int:
        """How many scripts a run of that scale plays: never fewer than keep every client busy once."""
        return max(self.num_clients, round(self.num_scripts * scale))

    def scripts(self, *, seed: str, num_scripts: int, count: CountTokens) -> list[Script]:
        """The scripts of one run; another seed shares no prefix with it."""
        shared = ""
        if self.num_shared_tokens:
            shared = texts.words_of(random.Random(f"{seed}/shared"), count, self.num_shared_tokens)
        return [
            Script(index, self.make(self, random.Random(f"{seed}/{index}"), shared, count), self.num_output_tokens)
            for index in range(num_scripts)
        ]


def _random(workload: Workload, rng: random.Random, shared: str, count: CountTokens) -> tuple[str, ...]:
    return (texts.words_of(rng, count, workload.num_prompt_tokens, before=f"{shared} " if shared else ""),)


def _chat(workload: Workload, rng: random.Random, shared: str, count: CountTokens) -> tuple[str, ...]:
    opening = texts.chat_opening(rng, count, workload.num_prompt_tokens)
    turns = (texts.chat_turn(rng, count, workload.num_turn_tokens) for _ in range(workload.num_turns - 1))
    return (opening, *turns)


def _repeating(workload: Workload, rng: random.Random, shared: str, count: CountTokens) -> tuple[str, ...]:
    return (texts.repeating_prompt(rng, count, workload.num_prompt_tokens, is_code=rng.random() < 0.5),)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "1 client, 128 in, 128 out", 1, 6, 128, 128, _random),
        Workload("W2", "16 clients, 128 in, 128 out", 16, 64, 128, 128, _random),
        Workload("W3", "8 clients, 1,024 shared + 32 own in, 32 out", 8, 32, 1056, 32, _random, num_shared_tokens=1024),
        Workload("W4", "1 client, 1,500 in, 8 out", 1, 4, 1500, 8, _random),
        Workload(
            "W5",
            "16 clients, chat of 5 turns, 128 in and 64 more a turn, 64 out",
            16,
            16,
            128,
            64,
            _chat,
            num_turns=5,
            num_turn_tokens=64,
        ),
        Workload("W6", "4 clients, 2,000 in, 400 out, repeating the input", 4, 8, 2000, 400, _repeating, repeats_input=True),
    )
}
