"""Goal: what a start spends its time on adds up, and is counted from the spawn of the process."""

from __future__ import annotations

from pathlib import Path

from headrace.startup import StartPhases, spawned_ns

SECOND = 1_000_000_000


def test_phases_follow_one_another_and_add_up() -> None:
    phases = StartPhases(10 * SECOND)
    phases.end("imports", 11 * SECOND)
    phases.end("load", 11 * SECOND + SECOND // 2)
    phases.end("load", 12 * SECOND)
    phases.end("peers", 14 * SECOND)
    assert phases.seconds() == {"imports": 1.0, "load": 1.0, "peers": 2.0, "total": 4.0}
    assert list(phases.seconds()) == ["imports", "load", "peers", "total"]


def test_the_spawn_is_found_on_the_monotonic_clock(tmp_path: Path) -> None:
    # The machine has slept for 5 s: the clock since boot is that much ahead. The process was spawned 2.5 s ago.
    stat = tmp_path / "stat"
    stat.write_text(f"7 (a) b) S {' '.join(['0'] * 18)} 10250 0 0")
    assert spawned_ns(100 * SECOND, boot_now_ns=105 * SECOND, ticks_per_s=100, stat=stat) == 97 * SECOND + SECOND // 2


def test_without_proc_a_process_begins_now(tmp_path: Path) -> None:
    assert spawned_ns(7, boot_now_ns=9, ticks_per_s=100, stat=tmp_path / "stat") == 7
    (tmp_path / "stat").write_text("7 (a")
    assert spawned_ns(7, boot_now_ns=9, ticks_per_s=100, stat=tmp_path / "stat") == 7
