"""Fair over tenants: who has been served least goes next, however much the others send.

Every tenant has a virtual token counter: what it has been served, input tokens by `INPUT_WEIGHT` and output tokens by
`OUTPUT_WEIGHT`. The waiting tenant with the smallest counter goes next; within a tenant the order is that of arrival. A tenant that
begins to wait after it had nothing here is lifted to the least counter of those that have something: idling earns no credit.

Output is counted when a choice is to be made, from what the running sequences have by then, so that a step costs nothing.

Source: the virtual token counter, VTC (OSDI 2024).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from services.scheduler.sequence import Sequence, Status

INPUT_WEIGHT: Final = 1
OUTPUT_WEIGHT: Final = 2
IDLE_TENANTS_MAX: Final = 10_000
"""Tenants with nothing here whose counters are remembered; beyond, those served least are forgotten, who have least to repay."""


class _Tenant:
    """What one tenant has here, and what it was served."""

    __slots__ = ("num_running", "served", "waiting")

    def __init__(self) -> None:
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.num_running = 0
        self.served = 0


class FairOverTenants:
    """The virtual token counters and what waits behind each."""

    takes_back = False

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        # Those of them that have something here.
        self._busy: dict[str, _Tenant] = {}
        # Sequences that have left the queue and not ended, each with the output tokens counted so far, -1 before its input is.
        self._running: dict[Sequence, int] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._busy.values():
            yield from tenant.waiting

    def served(self, name: str) -> int:
        """A tenant's counter."""
        self._count()
        return self._tenants[name].served

    def add(self, sequence: Sequence) -> None:
        """Take a sequence."""
        self._count()
        name = sequence.tenant
        tenant = self._busy.get(name)
        if tenant is None:
            tenant = self._tenants.setdefault(name, _Tenant())
            tenant.served = max(tenant.served, min((other.served for other in self._busy.values()), default=0))
            self._busy[name] = tenant
            self._forget_idle()
        tenant.waiting[sequence] = None
        self._num_waiting += 1

    def peek(self) -> Sequence | None:
        """The oldest of the waiting tenant that has been served least."""
        if not self._num_waiting:
            return None
        self._count()
        least = min((tenant for tenant in self._busy.values() if tenant.waiting), key=lambda tenant: tenant.served)
        return next(iter(least.waiting))

    def remove(self, sequence: Sequence) -> None:
        """Let go of a sequence that is held: it is admitted, and counted from now on, or it ended."""
        tenant = self._busy[sequence.tenant]
        del tenant.waiting[sequence]
        tenant.num_running += 1
        self._num_waiting -= 1
        self._running[sequence] = -1

    def _count(self) -> None:
        """Bring the counters up to what the sequences have got, and let go of those that have ended."""
        ended = []
        for sequence, num_counted in self._running.items():
            if sequence.num_admissions:
                tenant = self._busy[sequence.tenant]
                num_output_tokens = sequence.num_output_tokens
                if num_counted < 0:
                    tenant.served += INPUT_WEIGHT * sequence.num_prompt_tokens
                tenant.served += OUTPUT_WEIGHT * (num_output_tokens - max(0, num_counted))
                self._running[sequence] = num_output_tokens
            if sequence.status is Status.FINISHED:
                ended.append(sequence)
        for sequence in ended:
            del self._running[sequence]
            tenant = self._busy[sequence.tenant]
            tenant.num_running -= 1
            if not tenant.num_running and not tenant.waiting:
                del self._busy[sequence.tenant]

    def _forget_idle(self) -> None:
        if len(self._tenants) - len(self._busy) <= 2 * IDLE_TENANTS_MAX:
            return
        idle = sorted(self._tenants.keys() - self._busy.keys(), key=lambda name: self._tenants[name].served)
        for name in idle[:-IDLE_TENANTS_MAX]:
            del self._tenants[name]
