"""Parsers of reasoning and tool calls: what outputs mean, however they are cut, and what becomes of those that are broken."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from headrace.errors import ProtocolError
from headrace.output_formats import REASONING_FORMATS, TOOL_FORMATS
from services.detokenizer.parsers.output_parser import OutputParser, ReadingOptions
from services.detokenizer.parsers.reading import CallPart
from tests.unit.detokenizer.parser_corpus import CASES, TOOLS, Case


class Message:
    """What has been taken from a parser."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[CallPart] = []

    def take(self, parser: OutputParser) -> None:
        text, reasoning, parts = parser.take()
        self.text += text
        self.reasoning += reasoning
        for part in parts:
            if part.index == len(self.calls):
                assert part.name
                self.calls.append(CallPart(part.index, part.name, part.call_id))
            else:
                assert part.index == len(self.calls) - 1
                assert not part.name
            self.calls[part.index].arguments += part.arguments

    def content(self) -> tuple[str, str, list[tuple[str, str, str]]]:
        return self.text, self.reasoning, [(call.name, call.call_id, call.arguments) for call in self.calls]


def parse(options: ReadingOptions, texts: Iterable[str], *, is_finished: bool = True) -> Message:
    parser, message = OutputParser(options), Message()
    for text in texts:
        parser.push(text)
        message.take(parser)
    if is_finished:
        parser.finish()
        message.take(parser)
    return message


def arguments_of(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_output_means_what_it_says(case: Case) -> None:
    message = parse(case.options, [case.output])
    assert (message.text, message.reasoning) == (case.text, case.reasoning)
    assert tuple((call.name, arguments_of(call.arguments)) for call in message.calls) == case.calls
    if case.ids:
        assert tuple(call.call_id for call in message.calls) == case.ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_meaning_does_not_depend_on_where_the_output_is_cut(case: Case) -> None:
    output = case.output
    whole = parse(case.options, [output]).content()
    assert parse(case.options, output).content() == whole
    for border in range(1, len(output)):
        assert parse(case.options, [output[:border], output[border:]]).content() == whole, border


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_has_been_given_depends_only_on_what_was_read(case: Case) -> None:
    """A stream that is begun again elsewhere leaves out so many characters: they must be the same ones."""
    options = replace(case.options)
    parser, message = OutputParser(options), Message()
    for end, char in enumerate(case.output, 1):
        parser.push(char)
        message.take(parser)
        assert parse(options, [case.output[:end]], is_finished=False).content() == message.content(), end


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_parser_returns_to_an_earlier_point(case: Case) -> None:
    whole = parse(case.options, [case.output]).content()
    for border in range(0, len(case.output), 7):
        parser, message = OutputParser(case.options), Message()
        parser.push(case.output[:border])
        message.take(parser)
        num_texts = parser.num_texts
        parser.push(case.output[border:])
        parser.take()
        parser.rewind(num_texts)
        parser.push(case.output[border:])
        parser.finish()
        message.take(parser)
        assert message.content() == whole


def visible(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("format_", sorted(TOOL_FORMATS))
def test_broken_outputs_raise_nothing_and_their_words_come_through(format_: str) -> None:
    """Outputs cut off, and with characters left out, doubled or swapped: the words behind the damage come through."""
    rng = random.Random(format_)
    for case in [case for case in CASES if case.options.tool_format == format_]:
        for _ in range(300):
            chars = list(case.output[: rng.randrange(1, len(case.output) + 1)])
            for _ in range(rng.randrange(4)):
                at = rng.randrange(len(chars))
                chars[at : at + rng.randrange(3)] = rng.choice(["", "<", "{", '"', "}", "]", "\\", "zebra", case.output[:9]])
                chars = chars or ["x"]
            # The last word of a text is not part of any syntax.
            output = "".join(chars) + " giraffe"
            message = parse(case.options, [output])
            found = message.text + message.reasoning + "".join(call.arguments for call in message.calls)
            assert "giraffe" in visible(found), output
            assert parse(case.options, output).content() == message.content()


def test_every_format_has_a_parser_and_a_case() -> None:
    assert {case.options.tool_format for case in CASES} == {"", *TOOL_FORMATS}
    assert {case.options.reasoning_format for case in CASES} == {"", *REASONING_FORMATS}
    for format_ in TOOL_FORMATS:
        ReadingOptions(format_).check()
    with pytest.raises(ProtocolError, match="'nobody'"):
        ReadingOptions("nobody").check()
    with pytest.raises(ProtocolError, match="'nobody'"):
        ReadingOptions("", "nobody").check()


def test_arguments_stream_before_they_are_whole() -> None:
    output = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    message = parse(ReadingOptions("hermes", tools=TOOLS), [output], is_finished=False)
    assert message.content() == ("", "", [("get_weather", "", '{"city": "Par')])


@pytest.mark.parametrize(
    ("format_", "output"),
    [
        ("gpt_oss", "<|channel|>commentary to=functions.now<|message|>"),
        ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>"),
        ("qwen3_coder", "<function=now>"),
    ],
)
def test_a_call_without_arguments_is_whole_where_the_model_ended_it_and_not_where_it_was_cut(format_: str, output: str) -> None:
    for is_cut, arguments in ((False, "{}"), (True, "")):
        parser = OutputParser(ReadingOptions(format_, tools=TOOLS))
        parser.push(output)
        parser.finish(is_cut=is_cut)
        _, _, parts = parser.take()
        assert [(part.name, part.arguments) for part in parts] == [("now", arguments)]


def test_reasoning_is_seen_while_it_stands_open() -> None:
    parser = OutputParser(ReadingOptions("", "qwen3"))
    seen = []
    for text in ("<think>", "why", "</think>", "so"):
        parser.push(text)
        seen.append(parser.is_reasoning)
    assert seen == [True, True, False, False]


def test_held_reasoning_comes_whole_before_the_text() -> None:
    parser = OutputParser(ReadingOptions("", "qwen3", holds_reasoning=True))
    for text in ("<think>", "one ", "two", "</think>"):
        parser.push(text)
        assert parser.take() == ("", "", [])
    parser.push("so")
    assert parser.take() == ("so", "one two", [])


def test_tools_of_another_form_are_refused() -> None:
    for tools in ("{", "[1]", '[{"function": {}}]', '{"a": 1}'):
        with pytest.raises(ProtocolError, match="tools"):
            OutputParser(ReadingOptions("hermes", tools=tools))


def test_a_long_run_of_white_space_is_not_kept_for_ever() -> None:
    message = parse(ReadingOptions("hermes", tools=TOOLS), [" " * 5000], is_finished=False)
    assert len(message.text) == 5000 - 1024
