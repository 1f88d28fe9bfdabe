"""Conversations with tools for templates: in Hugging Face's form, and in words where a template knows no tools."""

from __future__ import annotations

import json

import pytest

from headrace.errors import InvalidRequestError, ProtocolError, RequestFailedError
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt
from services.tokenizer.conversations import template_kwargs_of, text_of, tools_of, turns_of
from services.tokenizer.templates import ChatTemplate

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
CONVERSATION = ChatPrompt(
    messages=[
        ChatMessage(role="user", content="What time is it?"),
        ChatMessage(role="assistant", tool_calls=json.dumps([CALL, CALL]), reasoning="I must look."),
        ChatMessage(role="tool", content="12:00", tool_call_id="c1"),
        ChatMessage(role="tool", content="13:00", tool_call_id="c2"),
    ],
    tools=json.dumps([TOOL]),
    template_kwargs='{"enable_thinking": false}',
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>"}, model="m", output_max=10000, strftime=lambda _: "")


def render(source: str, chat: ChatPrompt = CONVERSATION) -> str:
    return template(source).render(
        turns_of(chat),
        add_generation_prompt=True,
        continue_final_message=False,
        tools=tools_of(chat),
        kwargs=template_kwargs_of(chat),
    )


def test_a_template_with_tools_gets_calls_as_objects() -> None:
    source = (
        "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for m in messages %}{{ m.role }}"
        "{% for c in m.tool_calls %} {{ c.id }} {{ c.function.arguments.zone }}{% endfor %}"
        "{% if m.content is none %} nothing{% endif %} {{ m.reasoning_content }} {{ m.tool_call_id }};{% endfor %}"
        "{{ enable_thinking }}"
    )
    assert render(source) == "now;user  ;assistant c1 CET c1 CET nothing I must look. ;tool  c1;tool  c2;False"


def test_a_template_that_joins_arguments_with_text_gets_text() -> None:
    source = (
        "{{ tools | length }}"
        "{% for m in messages %}{% for c in m.tool_calls %}{{ ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert render(source) == '1 {"zone": "CET"} {"zone": "CET"}'
    with pytest.raises(RequestFailedError):
        render("{{ tools + 1 }}")


LOOKS_INTO_CONTENT = (
    "{% for t in tools or [] %}{{ '// ' + t.function.description + '|' + t.function.name }};{% endfor %}"
    "{% for m in messages %}{% if '<|x|>' in m.content %}{{ raise_exception('no channels') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
)


def test_a_template_that_looks_into_every_content_gets_an_empty_one_and_empty_descriptions() -> None:
    """As GPT-OSS's does. What it can do with as it is stays so: the calls' arguments are objects."""
    assert render(LOOKS_INTO_CONTENT) == (
        '// |now;user:What time is it?;assistant:{"zone": "CET"}{"zone": "CET"};tool:12:00;tool:13:00;'
    )
    told = {"type": "function", "function": {"name": "say", "description": "Says."}}
    chat = ChatPrompt(messages=CONVERSATION.messages[1:2], tools=json.dumps([told, TOOL]))
    joined = "{% for t in tools %}{{ '/' + t.function.description }}{% endfor %}{{ ':' + messages[0].content }}"
    assert render(joined + "{{ messages[0].tool_calls[0].function.arguments + '!' }}", chat) == '/Says./:{"zone": "CET"}!'


def test_a_repair_that_does_not_help_hides_no_reason() -> None:
    with pytest.raises(InvalidRequestError, match="refuses this conversation: 'dict object' has no attribute 'x'"):
        render("{{ tools[0].x.y }}{% for m in messages %}{{ m.content | length }}{% endfor %}")
    refused = ChatPrompt(messages=[*CONVERSATION.messages, ChatMessage(role="user", content="<|x|>")], tools=CONVERSATION.tools)
    with pytest.raises(InvalidRequestError, match="refuses this conversation: no channels"):
        render(LOOKS_INTO_CONTENT, refused)


def test_a_template_without_tools_gets_them_in_words() -> None:
    text = render(PLAIN)
    assert text.startswith("<system>You can call functions.")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert (
        '<assistant><tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>'
        "<user><tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response>"
    ) in text


def test_a_template_that_has_the_word_tools_but_not_the_tools_gets_them_in_words() -> None:
    """As Phi-4-mini's, which shows those that stand in the system turn, as no client sends them."""
    source = (
        "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m %}{{ m['content'] + '<|tool|>' + m['tools'] }}"
        "{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
    )
    assert render(source) == render(PLAIN)


def test_tools_in_words_follow_the_system_turn_that_is_there() -> None:
    chat = ChatPrompt(messages=[ChatMessage(role="system", content="Be brief.")], tools=json.dumps([TOOL]))
    assert render(PLAIN, chat).startswith("<system>Be brief.\n\nYou can call functions.")
    assert render(PLAIN, ChatPrompt(messages=[ChatMessage(role="user", content="hi")])) == "<user>hi"


# As Gemma 2's: no system turn, users' and assistants' by turns.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
SYSTEM_LEFT_OUT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("source", [NO_SYSTEM, SYSTEM_LEFT_OUT])
def test_tools_in_words_stand_before_the_first_user_turn_where_no_system_turn_may_be(source: str) -> None:
    text = render(source)
    assert text.startswith("<user>You can call functions.")
    assert f"{json.dumps(TOOL)}\n</tools>" in text
    assert "</tool_call>\n\nWhat time is it?<assistant><tool_call>" in text
    open_turn = [*CONVERSATION.messages[:1], ChatMessage(role="assistant", content="It is")]
    chat = ChatPrompt(messages=open_turn, tools=json.dumps([TOOL]))
    continued = template(source).render(
        turns_of(chat), add_generation_prompt=False, continue_final_message=True, tools=tools_of(chat)
    )
    assert continued == text[: text.index("<assistant>")] + "<assistant>It is"


def test_a_system_turn_of_the_client_s_is_refused_as_the_template_refuses_it() -> None:
    told = ChatMessage(role="system", content="Be brief.")
    for tools in ("", json.dumps([TOOL])):
        with pytest.raises(InvalidRequestError, match="System role not supported"):
            render(NO_SYSTEM, ChatPrompt(messages=[told, *CONVERSATION.messages], tools=tools))
    twice = [*CONVERSATION.messages[:1]] * 2
    with pytest.raises(InvalidRequestError, match="must alternate"):
        render(NO_SYSTEM, ChatPrompt(messages=twice, tools=json.dumps([TOOL])))


def test_granite_sees_its_calls_of_earlier_turns() -> None:
    """Its template joins each content with text and looks at no calls."""
    source = (
        "{{ tools[0].function.name }} <|tool_call|>{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    )
    call = '{"name": "now", "arguments": {"zone": "CET"}}'
    assert render(source) == (
        f"now <|tool_call|><user>What time is it?<assistant><|tool_call|>[{call}, {call}]<tool>12:00<tool>13:00"
    )


def test_template_variables_do_not_replace_the_conversation() -> None:
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="hi")], template_kwargs='{"messages": [], "bos_token": "x"}')
    assert render("{{ bos_token }}" + PLAIN, chat) == "<s><user>hi"


@pytest.mark.parametrize("arguments", ["not json", "[1]", '{"a": "\\ud800"}', '"text"', "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    calls = [{"id": "", "type": "function", "function": {"name": "now", "arguments": arguments}}]
    (turn,) = turns_of(ChatPrompt(messages=[ChatMessage(role="assistant", tool_calls=json.dumps(calls))]))
    assert turn["tool_calls"][0]["function"]["arguments"] == arguments


def test_what_is_not_of_the_wire_s_form_is_refused() -> None:
    with pytest.raises(ProtocolError, match="tool_calls"):
        turns_of(ChatPrompt(messages=[ChatMessage(role="assistant", tool_calls="[1]")]))
    for tools in ("{", "{}", "[1]"):
        with pytest.raises(ProtocolError, match="tools"):
            tools_of(ChatPrompt(tools=tools))
    with pytest.raises(ProtocolError, match="template_kwargs"):
        template_kwargs_of(ChatPrompt(template_kwargs="[]"))


def test_all_text_of_a_conversation_counts() -> None:
    assert len(text_of(CONVERSATION)) > len(CONVERSATION.tools) + len(CONVERSATION.messages[1].tool_calls) + 50
