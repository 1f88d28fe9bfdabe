"""The policies by the names that settings know them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from services.scheduler.lanes import Lanes
from services.scheduler.policies.dfs_weight import DepthFirstByWeight
from services.scheduler.policies.fair import FairOverTenants
from services.scheduler.policies.fcfs import FirstComeFirstServed
from services.scheduler.policies.lof import LongestOutputFirst
from services.scheduler.policies.lpm import LongestPrefixMatch
from services.scheduler.policies.policy import Policy
from services.scheduler.policies.priority import PriorityClasses
from services.scheduler.policies.random_order import RandomOrder

POLICIES: Final[Mapping[str, Callable[[Lanes], Policy]]] = {
    "fcfs": lambda _lanes: FirstComeFirstServed(),
    "lpm": LongestPrefixMatch,
    "dfs-weight": DepthFirstByWeight,
    "lof": lambda _lanes: LongestOutputFirst(),
    "random": lambda _lanes: RandomOrder(),
    "fair": lambda _lanes: FairOverTenants(),
    "priority": lambda _lanes: PriorityClasses(),
}
