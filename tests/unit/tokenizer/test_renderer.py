"""The renderer's child: it answers, it is killed when it must be, and it is started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.errors import InvalidRequestError, ModelError, RequestFailedError
from services.tokenizer.renderer import Renderer, RenderLimits

USER = {"role": "user", "content": "Hi"}
LIMITS = RenderLimits(timeout_s=20, memory_bytes=1 << 28, output_max=10_000_000)
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
    assert _render(renderer) == "ok"


def test_one_long_operation_is_killed_too(start: Callable[..., Renderer]) -> None:
    # A single power of integers: no bytecode boundary, no signal check, nothing an exception could interrupt.
    renderer = start(
        "{{ 7 ** ((messages | length + 8) ** 9) if messages[0].content == 'loop' else 'ok' }}", RenderLimits(0.3, 1 << 30, 1000)
    )
    with pytest.raises(RequestFailedError, match="was stopped"):
        _render(renderer, "loop")
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
