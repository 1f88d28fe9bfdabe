"""What the steps of a lane cost, measured, and how much of the waiting prompts a step with decodes takes therefore.

A prompt's tokens make every sequence that decodes beside them wait. So such a mixed step takes only so many as are expected to keep
it within a target; a step without decodes is nobody's wait and takes all that the budget allows. The expectation is a sum: the time
of a step that only decodes, by the number of tokens it decodes, and a time for each token of a prompt, by how many tokens stand
before it, for attention to 4,000 tokens may cost more than all the rest. Either is the lower quartile of the latest that were
measured, since whatever interrupts a step makes it longer. While nothing is known nothing is limited.

What a mixed step takes beyond the two, a fixed part above all, is counted to its prompt's tokens. That comes right by itself: with
smaller chunks each token is found dearer, and the size at which that is true is the one that meets the target.

Prompts are never starved: together they get a page of tokens in each step, and at least as long as the decodes
themselves take, for where decodes alone fill the target the machine is slow and small chunks would only make it slower.

Told durations, reads no clock.

Source: chunked prefill beside decodes within a latency target, Sarathi-Serve (OSDI 2024).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from headrace.latest_times import NUM_TRIES, LatestTimes

_FORGOTTEN_STEPS: Final = 1000
"""A number of decodes that was not met alone in so many steps is not known any more: their contexts may have grown or shrunk."""
_DEPTH_TOKENS: Final = 256
"""Prompt tokens with the same number of these before them are taken to cost the same."""


class StepCosts:
    """Times of one lane's steps.

    Args:
        target_ns: How long a step with decodes and prompts shall take, nanoseconds; 0 for no limit.
    """

    def __init__(self, target_ns: int = 0) -> None:
        self._target_ns = target_ns
        # By number of decoded tokens, the time of a step without prompts; by depth, that of a prompt's token beside decodes.
        self._decodes: dict[int, LatestTimes] = {}
        self._tokens: dict[int, LatestTimes] = {}
        self._num_steps = 0
        self._num_shares = 0

    def record_decodes(self, num_tokens: int, duration_ns: int) -> None:
        """A step that computed so many tokens of decoding sequences, drafts among them, and no prompts took that long."""
        if self._target_ns and duration_ns > 0:
            self._num_steps += 1
            _add(self._decodes, _size(num_tokens), duration_ns, self._num_steps)

    def record_share(self, share: PromptShare, num_drafts: int, duration_ns: int) -> None:
        """A step with that share of prompts, and so many drafts in the rows that decode, took that long."""
        # Without decodes it says nothing of what is added to them. A piece smaller than a page says little: all that is uncertain
        # about the decodes is in its few tokens.
        if self._target_ns and duration_ns > 0 and share.num_decodes and share.num_tokens >= share.page_size:
            self._num_steps += 1
            self._num_shares += 1
            token_ns = max(0.0, duration_ns - self.decode_ns(share.num_decodes + num_drafts)) / share.num_tokens
            _add(self._tokens, share.depth // _DEPTH_TOKENS, token_ns, self._num_steps)

    def prompt_ns(self, num_decodes: int) -> float | None:
        """How long the prompts of a step with so many decodes may take; None for however long."""
        if not num_decodes or self._num_shares < NUM_TRIES:
            return None
        decode_ns = self.decode_ns(num_decodes)
        return max(self._target_ns - decode_ns, decode_ns)

    def token_ns(self, depth: int) -> float:
        """Expected time of a prompt's token with `depth` tokens before it, by the nearest depth that is known; 0 if none is."""
        wanted = depth // _DEPTH_TOKENS
        found = self._tokens.get(wanted)
        if found is None and self._tokens:
            found = self._tokens[min(self._tokens, key=lambda known: (abs(known - wanted), known))]
        return found.time_ns if found is not None else 0.0

    def decode_ns(self, num_tokens: int) -> float:
        """Expected time of a step that decodes so many tokens and no more; 0 while nothing is known."""
        if (own := self._decodes.get(_size(num_tokens))) is not None and self._is_fresh(own):
            return own.time_ns
        known = sorted((size, found.time_ns) for size, found in self._decodes.items() if self._is_fresh(found))
        if not known:
            return 0.0
        sizes, times = zip(*known, strict=True)
        return float(np.interp(num_tokens, sizes, times))

    def _is_fresh(self, found: LatestTimes) -> bool:
        return found.is_known and self._num_steps - found.last_step <= _FORGOTTEN_STEPS


class PromptShare:
    """What one step computes of prompts: says how many tokens of each.

    Args:
        costs: Of the lane.
        num_decodes: Sequences that decode in the step.
        page_size: Tokens a page: what is computed of prompts in any case.

    Attributes:
        num_tokens: Prompt tokens that the step computes.
        is_limited: More would have been there, and in the lane's budget.
    """

    __slots__ = ("_costs", "_left_ns", "_num_before", "is_limited", "num_decodes", "num_tokens", "page_size")

    def __init__(self, costs: StepCosts, num_decodes: int, page_size: int) -> None:
        self.num_decodes = num_decodes
        self.page_size = page_size
        self.num_tokens = 0
        self.is_limited = False
        self._costs = costs
        self._left_ns = costs.prompt_ns(num_decodes)
        # Over all the tokens, those that stand before the token's chunk.
        self._num_before = 0

    @property
    def depth(self) -> int:
        """Tokens before its prompts' chunks, on average."""
        return self._num_before // self.num_tokens if self.num_tokens else 0

    def take(self, num_most: int, depth: int) -> int:
        """How many of a prompt's next tokens are computed.

        Args:
            num_most: So many at most: all that are left, or the budget's rest; at least 1.
            depth: Tokens before them.

        Returns:
            All of them, or as many whole pages as time is left for, or what the step still lacks to a page of prompt tokens.
        """
        num_taken = num_most
        if self._left_ns is not None:
            token_ns = self._costs.token_ns(depth)
            if token_ns * num_most > self._left_ns:
                num_fitting = int(self._left_ns / token_ns)
                least = max(0, self.page_size - self.num_tokens)
                num_taken = min(num_most, max(least, num_fitting // self.page_size * self.page_size))
                self.is_limited |= num_taken < num_most
            self._left_ns = max(0.0, self._left_ns - token_ns * num_taken)
        self.num_tokens += num_taken
        self._num_before += num_taken * depth
        return num_taken


def _add(kinds: dict[int, LatestTimes], kind: int, time_ns: float, step: int) -> None:
    found = kinds.get(kind)
    if found is None:
        found = kinds[kind] = LatestTimes()
    found.add(time_ns, step)


def _size(num_tokens: int) -> int:
    """Numbers of decodes that are kept as one: exact up to 15, then what is left of a number by its first four bits."""
    shift = max(0, num_tokens.bit_length() - 4)
    return num_tokens >> shift << shift
