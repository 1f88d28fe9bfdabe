"""Tools and reasoning in gRPC's Chat."""

from __future__ import annotations

import json

import pytest

from headrace.errors import InvalidRequestError
from headrace.v1.inference_pb2 import ChatRequest
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt
from services.router.generation import ConversationPrompt, ReasoningOptions, Tool, ToolCall, ToolCallDelta, ToolChoice
from services.router.grpc.conversions import chat_request, finish_reason_of, tool_call_deltas

TOOLS = json.dumps([{"type": "function", "function": {"name": "now"}}])
CALLS = json.dumps([{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}])


def chat(**fields: str) -> ChatRequest:
    return ChatRequest(prompt=ChatPrompt(messages=[ChatMessage(role="user", content="hi")], **fields))  # type: ignore[arg-type]


def test_tools_calls_and_reasoning_are_taken() -> None:
    request = chat(tools=TOOLS, template_kwargs='{"enable_thinking": true}')
    request.prompt.messages.append(ChatMessage(role="assistant", tool_calls=CALLS, reasoning="hm"))
    request.prompt.messages.append(ChatMessage(role="tool", content="noon", tool_call_id="c1"))
    request.tool_choice = "function:now"
    request.parallel_tool_calls = False
    request.reasoning.stream = False
    request.reasoning.budget_tokens = 7
    generation = chat_request(request)
    assert isinstance(generation.prompt, ConversationPrompt)
    assert generation.prompt.tools == (Tool("now"),)
    assert generation.prompt.template_kwargs == {"enable_thinking": True}
    assert generation.prompt.turns[1].tool_calls == (ToolCall("c1", "now", "{}"),)
    assert (generation.prompt.turns[1].reasoning, generation.prompt.turns[2].tool_call_id) == ("hm", "c1")
    assert (generation.tool_choice, generation.parallel_tool_calls) == (ToolChoice("named", "now"), False)
    assert generation.reasoning == ReasoningOptions(is_streamed=False, budget_tokens=7)
    assert chat_request(chat()).tool_choice == ToolChoice()


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (chat(tools="{"), "prompt.tools", "valid JSON"),
        (chat(tools='[{"type": "function"}]'), "prompt.tools.0.function", "Field required"),
        (chat(tools='["\\ud800"]'), "prompt.tools", "valid JSON"),
        (chat(template_kwargs="[]"), "prompt.template_kwargs", "a JSON object"),
        (chat(template_kwargs='{"tools": 1}'), "prompt.template_kwargs.tools", "template's own"),
        (ChatRequest(prompt=chat().prompt, tool_choice="any"), "tool_choice", "auto, none, required"),
        (
            ChatRequest(prompt=ChatPrompt(messages=[ChatMessage(role="assistant", tool_calls="[{}]")])),
            "prompt.messages.0.tool_calls.0.id",
            "Field required",
        ),
    ],
)
def test_a_refusal_names_the_field(request_: ChatRequest, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_request(request_)
    assert caught.value.param == param
    assert words in caught.value.message


def test_a_budget_has_a_range() -> None:
    request = chat()
    request.reasoning.budget_tokens = 0
    with pytest.raises(InvalidRequestError, match=r"reasoning.budget_tokens must be in \[1, "):
        chat_request(request)


def test_parts_of_calls_are_messages_and_calls_a_stop() -> None:
    (part,) = tool_call_deltas([ToolCallDelta(1, "{", "c", "now")])
    assert (part.index, part.id, part.name, part.arguments) == (1, "c", "now", "{")
    assert finish_reason_of("tool_calls") == finish_reason_of("stop")


def test_template_variables_have_a_depth() -> None:
    with pytest.raises(InvalidRequestError, match="nested at most 128 deep") as caught:
        chat_request(chat(template_kwargs='{"a":' * 300 + "{}" + "}" * 300))
    assert caught.value.param == "prompt.template_kwargs"
