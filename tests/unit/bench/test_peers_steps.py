"""Steps of the set-up: done once, done again when they change, stopped in time, and clear about what failed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.peers import setup
from bench.peers.layout import Layout
from bench.peers.steps import Step, StepError, is_done, run_steps
from headrace.supervision.process_table import read_table


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(step: Step, root: Path) -> list[str]:
    said: list[str] = []
    run_steps([step], stamps=root / "stamps", logs=root / "logs", say=said.append)
    return said


def counting(root: Path, text: str = "x") -> Step:
    made = root / "made"
    return Step("peer: make", 20, [python(f"open({str(made)!r}, 'a').write({text!r})")], makes=[made])


def test_a_step_is_done_once(tmp_path: Path) -> None:
    assert run(counting(tmp_path), tmp_path)[-1].startswith("peer: make: done in")
    assert run(counting(tmp_path), tmp_path) == ["peer: make: done before"]
    assert (tmp_path / "made").read_text() == "x"


def test_a_changed_command_or_a_lost_product_is_done_again(tmp_path: Path) -> None:
    run(counting(tmp_path), tmp_path)
    run(counting(tmp_path, "y"), tmp_path)
    assert (tmp_path / "made").read_text() == "xy"
    (tmp_path / "made").unlink()
    assert not is_done(counting(tmp_path, "y"), tmp_path / "stamps")


def test_a_failing_command_is_told_with_the_end_of_its_log_and_not_stamped(tmp_path: Path) -> None:
    step = Step("peer: fail", 20, [python("print('the reason'); raise SystemExit(3)")])
    with pytest.raises(StepError, match=r"(?s)peer: fail: .*status 3.*the reason"):
        run(step, tmp_path)
    assert not is_done(step, tmp_path / "stamps")


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no-such-program is not installed"):
        run(Step("peer: build", 20, [["no-such-program"]]), tmp_path)


def test_a_step_that_makes_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="did not make"):
        run(Step("peer: idle", 20, [python("")], makes=[tmp_path / "nothing"]), tmp_path)


def test_a_step_over_its_limit_is_stopped_with_all_its_processes(tmp_path: Path) -> None:
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(3600)']"
    grandchild = f"import subprocess, sys; subprocess.run({sleeper}, env={{'PEER': {str(tmp_path)!r}}})"
    with pytest.raises(StepError, match="not done within 1 s"):
        run(Step("peer: hang", 1, [python(grandchild)]), tmp_path)
    # All have their SIGKILL; the last may still be on its way out. The test's own timeout bounds it.
    while any(f"PEER={tmp_path}".encode() in read(Path(f"/proc/{pid}/environ")) for pid in read_table()):
        time.sleep(0.01)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_an_action_that_cannot_write_is_the_steps_failure(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="peer: act"):
        run(Step("peer: act", 20, action=lambda: (tmp_path / "no" / "folder").write_text("x") and None), tmp_path)


def test_every_peer_has_steps_of_different_names_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "model_gguf", lambda: tmp_path / "model.gguf")
    layout = Layout.at(tmp_path)
    steps = [
        step
        for peer in ("vllm", "llamacpp", "openvino", "transformers")
        for step in setup.peer_steps(peer, layout, torch_index=None)
    ]
    assert len({step.file_name for step in steps}) == len(steps)
    assert all(path.is_relative_to(tmp_path) for step in steps for path in step.makes)


def test_the_torch_index_is_asked_only_where_one_is_given(tmp_path: Path) -> None:
    def arguments(index: str | None) -> list[str]:
        steps = setup.peer_steps("transformers", Layout.at(tmp_path), torch_index=index)
        return [argument for step in steps for command in step.commands for argument in command]

    assert "--extra-index-url=https://torch" in arguments("https://torch")
    assert not any(argument.startswith("--extra-index-url") for argument in arguments(None))


def test_without_a_model_the_weights_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "model_directory", lambda: tmp_path)
    with pytest.raises(StepError, match="run the setup first"):
        setup.model_gguf()
