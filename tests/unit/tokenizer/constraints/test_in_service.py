"""Constraints on their way through the tokenizer's service."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from headrace.v1.common_pb2 import Constraint, ConstraintKind, WorkHeader
from headrace.v1.tokenizer_pb2 import Tokenize
from services.tokenizer import constraint_desk
from services.tokenizer.config import Settings
from services.tokenizer.constraints.compiler import ConstraintCompiler
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

    def counted(self: ConstraintCompiler, kind: str, source: str, *, param: str) -> str:
        compiled.append(source)
        return compile_one(self, kind, source, param=param)

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

    def hang(self: ConstraintCompiler, kind: str, source: str, *, param: str) -> str:
        release.wait(30)
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


async def test_one_that_is_too_long_is_refused(make: Make) -> None:
    world = await make(Settings(num_threads=1, constraint_bytes_max=10))
    reply, _ = await world.ask(_tokenize("REGEX", "a" * 11))
    assert (reply.error.code, reply.error.param) == ("invalid_request", "response_format")
    assert "11 bytes, the limit is 10" in reply.error.message


async def test_stopping_ends_what_is_being_compiled(make: Make) -> None:
    world = await make(SETTINGS)
    await world.ask(_tokenize("REGEX", "a+"))
    world.send(_tokenize("REGEX", "b+"))
    async with asyncio.timeout(10):
        await world.service.stop()
