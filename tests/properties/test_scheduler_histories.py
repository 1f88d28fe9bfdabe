"""The machines of the unit tests for longer: they are many, so they run without coverage, in a suite of their own."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.unit.scheduler.test_radix_tree import TreeMachine
from tests.unit.scheduler.test_scheduler_properties import SETTINGS, SchedulerMachine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_many_histories_of_a_scheduler() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=settings(SETTINGS, max_examples=10_000))


def test_many_histories_of_a_radix_tree() -> None:
    run_state_machine_as_test(TreeMachine, settings=settings(SETTINGS, max_examples=2_000))
