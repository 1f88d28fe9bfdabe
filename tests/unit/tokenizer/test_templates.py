"""Chat templates: the conventions of Hugging Face, continued messages, and what a template may not do."""

from __future__ import annotations

import pytest

from headrace.errors import InvalidRequestError, ModelError, RequestFailedError
from services.tokenizer.templates import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Hi <b>ü</b>"}


def _template(source: str, output_max: int = 10_000) -> ChatTemplate:
    return ChatTemplate(
        source, special_tokens={"bos_token": "<s>"}, model="tiny", output_max=output_max, strftime=lambda form: f"[{form}]"
    )


def _render(source: str, *messages: dict[str, str], opened: bool = False) -> str:
    return _template(source).render(messages or [USER], add_generation_prompt=opened, continue_final_message=False)


def test_the_generation_prompt_opens_the_assistants_turn() -> None:
    assert _render(CHATML, USER) == "<s>user\nHi <b>ü</b></s>\n"
    assert _render(CHATML, USER, opened=True) == "<s>user\nHi <b>ü</b></s>\n<s>assistant\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>ü</b>"}]'),
        ("{{ bos_token }}{{ tools is none }}", "<s>True"),
        ("{{ strftime_now('%Y') }}", "[%Y]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{% set ns = namespace(n=1) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{{ dict(a=1).a }}", "1"),
    ],
)
def test_follows_the_conventions_of_hugging_face(source: str, expected: str) -> None:
    assert _render(source) == expected


@pytest.mark.parametrize("content", ["The capital", "The capital ", "", "a\ue000the final message goes on here "])
def test_a_continued_message_stays_open_as_it_is(content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    rendered = _template(CHATML).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == f"<s>user\nHi <b>ü</b></s>\n<s>assistant\n{content}"


def test_a_continued_message_is_trimmed_where_the_template_trims() -> None:
    trimming = "{% for message in messages %}{{ message['content'] | trim }}|{% endfor %}"
    rendered = _template(trimming).render(
        [{"role": "assistant", "content": "The capital  "}], add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == "The capital"


@pytest.mark.parametrize(
    ("source", "messages", "opened", "pattern"),
    [
        (CHATML, [USER], False, "role 'user'; it must be 'assistant'"),
        (CHATML, [{"role": "assistant", "content": "x"}], True, "continue_final_message and add_generation_prompt are both true"),
        ("{{ messages[0].role }}", [{"role": "assistant", "content": "x"}], False, "does not show the final message"),
        (CHATML, [], False, "messages: there are 0, at least 1 is needed"),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, messages: list[dict[str, str]], opened: bool, pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match=pattern):
        _template(source).render(messages, add_generation_prompt=opened, continue_final_message=True)


def test_the_templates_own_refusal_is_passed_on() -> None:
    with pytest.raises(
        InvalidRequestError, match="the chat template of tiny refuses this conversation: no system role here"
    ) as caught:
        _render("{{ raise_exception('no system role here') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% set ns = namespace(_a=1) %}"])
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="refuses this conversation"):
        _render(source)


def test_a_template_that_fails_is_told_from_a_conversation_that_does() -> None:
    with pytest.raises(RequestFailedError, match="failed on this conversation: ZeroDivisionError"):
        _render("{{ 1 / (messages | length - 1) }}")


def test_output_is_bounded() -> None:
    with pytest.raises(InvalidRequestError, match="more than 100 characters"):
        _template("{% for i in range(1000) %}{{ i }}{% endfor %}", output_max=100).render(
            [USER], add_generation_prompt=False, continue_final_message=False
        )


def test_a_broken_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="model tiny: its chat template cannot be compiled"):
        _template("{% for %}")
