"""Constraints on their way through the tokenizer's service."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from headrace.grammars import compile_grammar, load_vocabulary
from headrace.v1.common_pb2 import Constraint, ConstraintKind, WorkHeader
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt, Tokenize
from services.tokenizer import constraint_desk
from services.tokenizer.config import Settings
from services.tokenizer.constraints.compiler import ConstraintCompiler
from tests.patience import WAIT_S
from tests.unit.tokenizer.test_service import SETTINGS, Make, make

__all__ = ["make"]


def _tokenize(kind: str = "", source: str = "", *, request_id: str = "r1") -> Tokenize:
    body = Tokenize(work=WorkHeader(request_id=request_id), model="tiny", text="ab")
    if kind:
        body.constraint.CopyFrom(Constraint(kind=ConstraintKind.Value(f"CONSTRAINT_KIND_{kind}"), source=source))
        body.constraint_param = "response_format"
    return body


async def test_the_answer_has_the_grammar_and_a_wrong_one_is_refused(make: Make) -> None:
    world = await make()
    reply, tokens = await world.ask(_tokenize("CHOICE", '["a", "b"]'))
    assert '"a' in reply.grammar.replace("\\", "")
    assert tokens
    reply, tokens = await world.ask(_tokenize("JSON_SCHEMA", '{"properties": {"a": {"not": {}}}}'))
    assert (reply.error.code, reply.error.param, tokens) == ("invalid_request", "response_format", [])
    assert "the schema at #/properties/a/not" in reply.error.message
    reply, _ = await world.ask(_tokenize())
    assert reply.grammar == ""
    assert world.service.load().num_waiting == world.service.load().num_running == 0


async def test_what_is_known_is_not_compiled_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_one = ConstraintCompiler.compile

    def counted(self: ConstraintCompiler, kind: str, source: str, *, param: str, block: object = None) -> str:
        compiled.append(source)
        return compile_one(self, kind, source, param=param, block=block)  # type: ignore[arg-type]

    monkeypatch.setattr(ConstraintCompiler, "compile", counted)
    world = await make()
    first, _ = await world.ask(_tokenize("REGEX", "a+"))
    second, _ = await world.ask(_tokenize("REGEX", "a+"))
    assert first.grammar == second.grammar
    for _ in range(2):
        assert (await world.ask(_tokenize("REGEX", "(")))[0].error.code == "invalid_request"
    assert compiled == ["a+", "("]


async def test_a_constraint_that_takes_long_holds_up_no_other_prompt(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compilers hang, more constraints wait than may; prompts without one are answered, and too many constraints refused."""
    release = threading.Event()

    def hang(self: ConstraintCompiler, kind: str, source: str, *, param: str, block: object = None) -> str:
        release.wait(WAIT_S)
        return "start: /a/"

    monkeypatch.setattr(ConstraintCompiler, "compile", hang)
    monkeypatch.setattr(constraint_desk, "WAITING_MAX", 3)
    world = await make(Settings(num_threads=1, num_constraint_threads=2))
    for index in range(6):
        world.send(_tokenize("REGEX", f"a{index}", request_id=f"c{index}"))
    [(refused, _)] = await world.replies(1)
    assert (refused.request_id, refused.error.code) == ("c5", "overloaded")
    for _ in range(5):
        reply, tokens = await world.ask(_tokenize(request_id="plain"))
        assert (reply.request_id, bool(tokens)) == ("plain", True)
    release.set()
    found: list[Any] = await world.replies(5)
    assert sorted(reply.request_id for reply, _ in found) == [f"c{index}" for index in range(5)]
    assert all(reply.grammar for reply, _ in found)


def _use_template(directory: Path, template: str) -> None:
    config = {"chat_template": template, "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _chat(kind: str, source: str, **kwargs: object) -> Tokenize:
    body = _tokenize(kind, source)
    body.chat.CopyFrom(ChatPrompt(messages=[ChatMessage(role="user", content="hi")], template_kwargs=json.dumps(kwargs)))
    return body


async def test_reasoning_may_come_before_it_as_the_prompt_leaves_it(make: Make, model_directory: Path) -> None:
    _use_template(model_directory, "{{ tools }}{% if thinks %}<think>{% elif thinks is defined %}<think></think>{% endif %}")
    world = await make()
    vocabulary = load_vocabulary(model_directory, vocab_size=260, eos_token_ids=(257,))

    async def allowed(**kwargs: object) -> list[bool]:
        reply, _ = await world.ask(_chat("JSON_SCHEMA", '{"type": "integer"}', **kwargs))
        outputs = ("7", "<think>hm</think>7", "hm</think>7")
        counts = [(compile_grammar(vocabulary, reply.grammar), vocabulary.greedy_tokenize(output)) for output in outputs]
        return [matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting() for matcher, tokens in counts]

    assert await allowed() == [True, True, False]
    assert await allowed(thinks=True) == [False, True, True]
    assert await allowed(thinks=False) == [True, False, False]
    plain, _ = await world.ask(_tokenize("JSON_SCHEMA", '{"type": "integer"}'))
    assert "think" not in plain.grammar


STRICT = '{"tools": [{"name": "now", "parameters": {"not": {}}, "is_strict": true}], "is_parallel": true}'


async def test_strict_tools_are_held_to_in_the_models_own_format(make: Make, model_directory: Path) -> None:
    _use_template(model_directory, "{{ tools }}<tool_call>")
    world = await make()
    good = STRICT.replace('{"not": {}}', "null")
    assert "<tool_call>" in (await world.ask(_chat("TOOL_CALLS", good)))[0].grammar
    refused = (await world.ask(_chat("TOOL_CALLS", STRICT)))[0].error
    assert "the strict tools at #/tools/0/parameters/not: not cannot be enforced" in refused.message


async def test_a_format_without_a_mark_lets_strict_tools_be_as_they_were(make: Make, model_directory: Path) -> None:
    _use_template(model_directory, "{{ tools }}<|python_tag|>")
    world = await make()
    reply, tokens = await world.ask(_chat("TOOL_CALLS", STRICT))
    assert (reply.HasField("error"), reply.grammar, bool(tokens)) == (False, "", True)


async def test_one_that_is_too_long_is_refused(make: Make) -> None:
    world = await make(Settings(num_threads=1, constraint_bytes_max=10))
    reply, _ = await world.ask(_tokenize("REGEX", "a" * 11))
    assert (reply.error.code, reply.error.param) == ("invalid_request", "response_format")
    assert "11 bytes, the limit is 10" in reply.error.message


async def test_stopping_ends_what_is_being_compiled(make: Make) -> None:
    world = await make(SETTINGS)
    await world.ask(_tokenize("REGEX", "a+"))
    world.send(_tokenize("REGEX", "b+"))
    async with asyncio.timeout(WAIT_S):
        await world.service.stop()
