"""Chat templates and encoding against transformers, on the default model and on templates that use every convention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.models.model_config import load_tokenizer_config
from headrace.v1.tokenizer_pb2 import ChatMessage, ChatPrompt
from services.tokenizer.conversations import template_kwargs_of, tools_of, turns_of
from services.tokenizer.encoding import Encoder, PromptLimits
from services.tokenizer.templates import ChatTemplate

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": "Größe? 日本語 😀 <b>&amp;</b> {{ x }}"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello there. "}, {"role": "user", "content": ""}],
    [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2,"}],
    [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "1, 2, "}],
]
TEMPLATES = {
    "llama_3": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}\n"
    ),
    "alternating": (
        "{% if messages[0]['role'] == 'system' %}\n  {% set rest = messages[1:] %}\n  {% set first = messages[0]['content'] %}\n"
        "{% else %}\n  {% set rest = messages %}\n  {% set first = '' %}\n{% endif %}\n"
        "{% set ns = namespace(count=0) %}\n{% for message in rest %}\n"
        "  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}\n"
        "  {% generation %}[{{ first if loop.first else '' }}{{ message['content'] }}]{% endgeneration %}\n"
        "  {% if loop.last %}{% continue %}{% endif %},\n{% endfor %}\n"
        "{{ ns.count }} {{ tools is none }} {{ messages[0] | tojson }}"
    ),
}


@pytest.fixture(scope="module")
def reference(default_model_directory: Path) -> Any:
    """The default model's tokenizer, as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(default_model_directory)


@pytest.fixture(scope="module")
def encoder(default_model_directory: Path) -> Encoder:
    """The same, as the service loads it."""
    limits = PromptLimits(model="default", vocab_size=49152, max_model_len=8192, prompt_bytes_max=1 << 20)
    return Encoder((default_model_directory / "tokenizer.json").read_text(encoding="utf-8"), limits)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ["default", *TEMPLATES])
def test_renders_and_encodes_as_transformers_does(
    reference: Any, encoder: Encoder, default_model_directory: Path, name: str, conversation: list[dict[str, str]], opened: bool
) -> None:
    config = load_tokenizer_config(default_model_directory)
    source = TEMPLATES.get(name, config.chat_template)
    assert source is not None
    template = ChatTemplate(source, special_tokens=config.special_tokens, model=name, output_max=100_000, strftime=str)
    continued = conversation[-1]["role"] == "assistant" and not opened
    expected = reference.apply_chat_template(
        conversation, chat_template=source, tokenize=False, add_generation_prompt=opened, continue_final_message=continued
    )
    rendered = template.render(conversation, add_generation_prompt=opened, continue_final_message=continued)
    assert rendered == expected
    tokens = encoder.encode(rendered, add_special_tokens=False, field="messages").tolist()
    assert tokens == reference(expected, add_special_tokens=False)["input_ids"]


TOOL = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "Größe"}'}}
WITH_TOOLS = (
    "{% if tools %}<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content or '' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_tools_calls_and_variables_render_as_with_transformers(reference: Any) -> None:
    parsed = {**CALL, "function": {"name": "now", "arguments": {"zone": "Größe"}}}
    expected = reference.apply_chat_template(
        [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": None, "tool_calls": [parsed], "reasoning_content": "hm"},
            {"role": "tool", "content": "now", "tool_call_id": "c1"},
        ],
        tools=[TOOL],
        chat_template=WITH_TOOLS,
        tokenize=False,
        enable_thinking=False,
    )
    chat = ChatPrompt(
        messages=[
            ChatMessage(role="user", content="When?"),
            ChatMessage(role="assistant", tool_calls=json.dumps([CALL]), reasoning="hm"),
            ChatMessage(role="tool", content="now", tool_call_id="c1"),
        ],
        tools=json.dumps([TOOL]),
        template_kwargs='{"enable_thinking": false}',
    )
    template = ChatTemplate(WITH_TOOLS, special_tokens={}, model="m", output_max=100_000, strftime=str)
    rendered = template.render(
        turns_of(chat),
        add_generation_prompt=False,
        continue_final_message=False,
        tools=tools_of(chat),
        kwargs=template_kwargs_of(chat),
    )
    assert rendered == expected
