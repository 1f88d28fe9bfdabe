"""The renderer's child: it answers, it is killed when it must be, and it is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from headrace.errors import InvalidRequestError, ModelError, RequestFailedError, UnavailableError
from services.tokenizer.killable import KillableChild, LateError
from services.tokenizer.renderer import Renderer, RenderLimits
from tests.patience import WAIT_S

USER = {"role": "user", "content": "Hi"}
LIMITS = RenderLimits(timeout_s=WAIT_S, memory_bytes=1 << 28, output_max=10_000_000)
ENDLESS = (
    "{% if messages[0].content == 'loop' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}ok"
)


@pytest.fixture
def start() -> Iterator[Callable[..., Renderer]]:
    """Starts renderers and ends them."""
    renderers = []

    def start_one(template: str, limits: RenderLimits = LIMITS) -> Renderer:
        renderer = Renderer(template, special_tokens={"bos_token": "<s>"}, model="tiny", limits=limits)
        renderers.append(renderer)
        renderer.start()
        return renderer

    yield start_one
    for renderer in renderers:
        renderer.close()


def _render(renderer: Renderer, content: str = "Hi") -> str:
    return renderer.render([{"role": "user", "content": content}], add_generation_prompt=True, continue_final_message=False)


class SlowChild:
    """A child whose start takes long: of each life the processor time at each look, after the last of which it answers or not."""

    is_running = False
    cpu_s = 0.0

    def __init__(self, *lives: Sequence[float], answers: bool) -> None:
        self._lives = list(lives)
        self._answers = answers
        self.num_starts = 0
        self.num_kills = 0

    def start(self) -> None:
        self.num_starts += 1
        self.cpu_s = 0.0

    def ask(self, question: object, timeout_s: float, *, goes_on: Callable[[], bool]) -> dict[str, object]:
        looks = self._lives[min(self.num_starts, len(self._lives)) - 1]
        for self.cpu_s in looks:
            if not goes_on():
                raise LateError
        assert self._answers, "more looks than the test has foreseen"
        return {}

    def kill(self) -> int:
        self.num_kills += 1
        return -9


def _slow(*lives: Sequence[float], answers: bool = True) -> tuple[Renderer, SlowChild]:
    renderer = Renderer("ok", special_tokens={}, model="tiny", limits=LIMITS)
    child = SlowChild(*lives, answers=answers)
    renderer._child = child  # type: ignore[assignment]
    return renderer, child


def test_a_start_that_goes_on_slowly_is_waited_for_and_told() -> None:
    renderer, child = _slow([0.01, 0.02, 0.3, 4.0])
    told: list[str] = []
    renderer.start(told.append)
    assert (child.num_starts, child.num_kills) == (1, 0)
    assert len(told) == 4
    assert told[3].startswith("the renderer of chat templates has started for 40 s, of which it computed 4.00 s")


def test_a_child_that_gets_nothing_done_is_replaced() -> None:
    renderer, child = _slow([0.0], [0.1, 0.1], [])
    told: list[str] = []
    renderer.start(told.append)
    assert (child.num_starts, child.num_kills) == (3, 2)
    assert [line for line in told if "is replaced (2 times so far)" in line]


def test_where_no_child_gets_anything_done_the_template_is_not_blamed() -> None:
    renderer, child = _slow([0.0], answers=False)
    with pytest.raises(UnavailableError, match="3 times in a row; is the machine overloaded"):
        renderer.start()
    assert child.num_kills == 3


def test_a_template_that_costs_too_much_is_refused_at_once() -> None:
    renderer, child = _slow([9.0, 19.0, 31.0], answers=False)
    with pytest.raises(ModelError, match=r"model tiny: its chat template could not be compiled in 30 s of processor time"):
        renderer.start()
    assert (child.num_starts, child.num_kills) == (1, 1)


def test_a_child_that_does_not_come_back_is_told_to_who_asks() -> None:
    renderer, child = _slow([0.0], answers=False)
    with pytest.raises(UnavailableError, match="did not start again in time"):
        _render(renderer)
    assert (child.num_starts, child.num_kills) == (1, 1)


def test_a_wait_for_a_child_has_an_end() -> None:
    renderer, child = _slow([index / 1000 for index in range(1, 100)], answers=False)
    with pytest.raises(UnavailableError):
        renderer.start()
    assert child.num_kills == 3


def test_a_child_is_asked_for_longer_as_long_as_it_is_wanted_to() -> None:
    child = KillableChild("services.tokenizer.renderer", answer_bytes_max=1000)
    setup = {"template": "ok", "special_tokens": {}, "model": "tiny", "output_max": 10, "memory_bytes": 1 << 28}
    num_looks = 0

    def goes_on() -> bool:
        nonlocal num_looks
        num_looks += 1
        assert child.pid is not None
        os.kill(child.pid, signal.SIGCONT)
        return True

    try:
        assert child.cpu_s == 0.0
        child.start()
        # It goes on with the first look: no answer comes before.
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        assert child.ask(setup, 0.001, goes_on=goes_on) == {}
        assert num_looks > 0
        assert child.cpu_s > 0.0
        with pytest.raises(LateError):
            child.ask({"messages": []}, 0.0)
    finally:
        child.kill()


def _is_gone(pid: int | None) -> bool:
    assert pid is not None
    return not Path(f"/proc/{pid}").exists()


def test_renders_and_passes_errors_on(start: Callable[..., Renderer]) -> None:
    renderer = start(
        "{{ bos_token }}{{ messages[0].content }}{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}"
    )
    assert _render(renderer, "größe 😀") == "<s>größe 😀"
    with pytest.raises(InvalidRequestError, match="one only") as caught:
        renderer.render([USER, USER], add_generation_prompt=True, continue_final_message=False)
    assert caught.value.param == "messages"
    assert _render(renderer) == "<s>Hi"


def test_messages_larger_than_a_pipe_pass_both_ways(start: Callable[..., Renderer]) -> None:
    content = "ü\n" * 500_000
    assert _render(start("{{ messages[0].content }}"), content) == content


def test_an_endless_template_is_killed_and_the_next_conversation_served(start: Callable[..., Renderer]) -> None:
    renderer = start(ENDLESS, RenderLimits(timeout_s=0.3, memory_bytes=1 << 28, output_max=1000))
    pid = renderer.pid
    with pytest.raises(RequestFailedError, match=r"took longer than 0\.3 s and was stopped"):
        _render(renderer, "loop")
    assert _is_gone(pid)
    renderer._limits = LIMITS
    assert _render(renderer) == "ok"


def test_one_long_operation_is_killed_too(start: Callable[..., Renderer]) -> None:
    # A single power of integers: no bytecode boundary, no signal check, nothing an exception could interrupt.
    renderer = start(
        "{{ 7 ** ((messages | length + 8) ** 9) if messages[0].content == 'loop' else 'ok' }}", RenderLimits(0.3, 1 << 30, 1000)
    )
    with pytest.raises(RequestFailedError, match="was stopped"):
        _render(renderer, "loop")
    renderer._limits = LIMITS
    assert _render(renderer) == "ok"


def test_memory_is_bounded(start: Callable[..., Renderer]) -> None:
    renderer = start("{{ (messages[0].content * 1000000000) | length }}")
    with pytest.raises(RequestFailedError, match="MemoryError"):
        _render(renderer)


def test_a_child_that_died_is_started_again(start: Callable[..., Renderer]) -> None:
    renderer = start("ok")
    renderer.interrupt()
    with pytest.raises(RequestFailedError, match="ended with status -9"):
        # The kill may be noticed before the request is sent, and the child is then simply started again.
        while True:
            renderer.interrupt()
            assert _render(renderer) == "ok"
    assert _render(renderer) == "ok"


def test_close_leaves_no_process(start: Callable[..., Renderer]) -> None:
    renderer = start("ok")
    pid = renderer.pid
    renderer.close()
    assert _is_gone(pid)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 + }}"])
def test_a_broken_template_stops_the_start(start: Callable[..., Renderer], template: str) -> None:
    with pytest.raises(ModelError, match="model tiny: its chat template cannot be compiled"):
        start(template)
