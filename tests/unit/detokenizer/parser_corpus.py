"""Outputs as models write them, and what they mean. Made up by us after the formats' descriptions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from services.detokenizer.parsers.output_parser import ReadingOptions

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "days": {"type": "integer"},
                        "units": {"enum": ["C", 1]},
                        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                        "zip": {"type": ["string", "null"]},
                        "zone": {"$ref": "#/$defs/zone"},
                        "kind": {"enum": ["1", "true"]},
                    },
                    "$defs": {"zone": {"allOf": [{"type": "string"}, {}]}},
                },
            },
        },
        {"type": "function", "function": {"name": "now"}},
    ]
)


@dataclass(frozen=True)
class Case:
    """An output, how it is read, and its meaning. Calls are (name, arguments as a JSON value or, where it is none, as text)."""

    name: str
    options: ReadingOptions
    output: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, object], ...] = ()
    ids: tuple[str, ...] = field(default=())


def _tools(format_: str, *, reasoning: str = "", inside: bool = False) -> ReadingOptions:
    return ReadingOptions(format_, reasoning, inside, TOOLS)


PARIS = ("get_weather", {"city": "Paris"})
NOW = ("now", {})
_DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)

CASES = [
    # Hermes, Qwen.
    Case(
        "hermes two calls",
        _tools("hermes"),
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
        "Let me look.",
        calls=(PARIS, NOW),
    ),
    Case(
        "hermes odd strings",
        _tools("hermes"),
        '<tool_call>{"name":"get_weather","arguments":{"city":"</tool_call> \\"{[é𝄞\\u00e9\\\\"}}</tool_call>',
        calls=(("get_weather", {"city": '</tool_call> "{[é𝄞é\\'}),),
    ),
    Case(
        "hermes arguments in a string",
        _tools("hermes"),
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        calls=(PARIS,),
    ),
    Case("hermes no arguments", _tools("hermes"), '<tool_call>{"name": "now"}</tool_call>', calls=(NOW,)),
    Case("hermes null arguments", _tools("hermes"), '<tool_call>{"name": "now", "arguments": null}</tool_call>', calls=(NOW,)),
    Case("hermes text behind", _tools("hermes"), '<tool_call>{"name": "now"}</tool_call> Done.', " Done.", calls=(NOW,)),
    Case("hermes missing brace", _tools("hermes"), '<tool_call>{"name":"now","arguments":{}</tool_call>ok', "ok", calls=(NOW,)),
    Case(
        "hermes unknown tool",
        _tools("hermes"),
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    ),
    Case("hermes no JSON", _tools("hermes"), "a <tool_call> b </tool_call> <tool", "a <tool_call> b </tool_call> <tool"),
    Case("hermes broken", _tools("hermes"), '<tool_call>{"name": now}</tool_call>', '<tool_call>{"name": now}</tool_call>'),
    Case(
        "hermes cut in the name",
        _tools("hermes"),
        'x <tool_call>{"name": "get_wea',
        'x <tool_call>{"name": "get_wea',
    ),
    Case(
        "hermes cut in the arguments",
        _tools("hermes"),
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        calls=(("get_weather", '{"city": "Pa'),),
    ),
    # JSON alone.
    Case(
        "json array",
        _tools("json"),
        ' [{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "arguments": {}}] ',
        calls=(PARIS, NOW),
    ),
    Case("json object", _tools("json"), '{"name": "now", "arguments": {}}', calls=(NOW,)),
    Case("json empty", _tools("json"), "[ ]", "[ ]"),
    Case("json text", _tools("json"), "Hello [1]", "Hello [1]"),
    Case("json numbers", _tools("json"), "[1, 2]", "[1, 2]"),
    # Llama 3.
    Case("llama bare", _tools("llama3_json"), '{"name": "get_weather", "parameters": {"city": "Paris"}}', calls=(PARIS,)),
    Case(
        "llama tagged two",
        _tools("llama3_json"),
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        calls=(PARIS, NOW),
    ),
    Case("llama JSON answer", _tools("llama3_json"), '{"city": "Paris", "n": 1}', '{"city": "Paris", "n": 1}'),
    Case("llama bare name", _tools("llama3_json"), '{"name": "now"}', '{"name": "now"}'),
    Case("llama code", _tools("llama3_json"), "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    # Pythonic.
    Case(
        "pythonic two",
        _tools("pythonic"),
        "[get_weather(city='Par\\'is', days=-3, units=[True, None]), now()]",
        calls=(("get_weather", {"city": "Par'is", "days": -3, "units": [True, None]}), NOW),
    ),
    Case(
        "pythonic marked",
        _tools("pythonic"),
        '<|python_start|>[get_weather(city="Paris")]<|python_end|>',
        calls=(PARIS,),
    ),
    Case(
        "pythonic three quotes",
        _tools("pythonic"),
        '[get_weather(city="""say "hi", (or) \'no\'\n\\"", ok)""", note=\'\'\'it\'s ""\'\'\', zip="", zone=\'\', days=2), now()]',
        calls=(
            ("get_weather", {"city": 'say "hi", (or) \'no\'\n"", ok)', "note": 'it\'s ""', "zip": "", "zone": "", "days": 2}),
            NOW,
        ),
    ),
    Case("pythonic empty three quotes", _tools("pythonic"), '[get_weather(city="""""")]', calls=(("get_weather", {"city": ""}),)),
    Case(
        "pythonic three quotes cut", _tools("pythonic"), '[get_weather(city="""a", b', calls=(("get_weather", '{"city": """a", b'),)
    ),
    Case("pythonic JSON words", _tools("pythonic"), "[get_weather(units=true)]", calls=(("get_weather", {"units": True}),)),
    Case("pythonic word", _tools("pythonic"), "[get_weather(city=Paris)]", calls=(PARIS,)),
    Case("pythonic list", _tools("pythonic"), "[1, 2] are numbers", "[1, 2] are numbers"),
    Case("pythonic unknown", _tools("pythonic"), "[rm(path='/')]", "[rm(path='/')]"),
    Case("pythonic without name", _tools("pythonic"), "[get_weather('Paris')]", "[get_weather('Paris')]"),
    Case("pythonic cut", _tools("pythonic"), "[get_weather(city='Pa", calls=(("get_weather", '{"city": \'Pa'),)),
    # Granite 3.
    Case(
        "granite two calls",
        _tools("granite"),
        'I look. <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        "I look.",
        calls=(PARIS, NOW),
    ),
    Case("granite one", _tools("granite"), '<|tool_call|> {"arguments": {"city": "Paris"}, "name": "get_weather"}', calls=(PARIS,)),
    Case(
        "granite text behind", _tools("granite"), '<|tool_call|>[{"name": "now"}] <|tool_call|>no', " <|tool_call|>no", calls=(NOW,)
    ),
    Case("granite unknown", _tools("granite"), '<|tool_call|>[{"name": "rm"}]', '<|tool_call|>[{"name": "rm"}]'),
    # Mistral.
    Case(
        "mistral array",
        _tools("mistral"),
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        calls=(PARIS, NOW),
    ),
    Case("mistral named", _tools("mistral"), '[TOOL_CALLS]get_weather{"city": "Paris"}', calls=(PARIS,)),
    Case(
        "mistral args",
        _tools("mistral"),
        'Hm. [TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        "Hm.",
        calls=(PARIS, NOW),
        ids=("a1B2c3D4e", ""),
    ),
    Case("mistral broken", _tools("mistral"), "[TOOL_CALLS]what now", "[TOOL_CALLS]what now"),
    # DeepSeek.
    Case(
        "deepseek v3",
        _tools("deepseek_v3"),
        f'Ok.{_DS[0]}{_DS[1]}function{_DS[2]}get_weather\n```json\n{{"city": "Paris"}}\n```{_DS[3]}\n'
        f"{_DS[1]}function{_DS[2]}now\n```json\n{{}}\n```{_DS[3]}{_DS[4]}",
        "Ok.",
        calls=(PARIS, NOW),
    ),
    Case(
        "deepseek v3.1",
        _tools("deepseek_v31", reasoning="deepseek_r1", inside=True),
        f'hm</think>Ok.{_DS[0]}{_DS[1]}get_weather{_DS[2]}{{"city": "Paris"}}{_DS[3]}{_DS[1]}now{_DS[2]}{{}}{_DS[3]}{_DS[4]}',
        "Ok.",
        "hm",
        calls=(PARIS, NOW),
    ),
    Case("deepseek broken", _tools("deepseek_v31"), f"{_DS[1]}now {{}}", f"{_DS[1]}now {{}}"),
    Case(
        "deepseek no JSON",
        _tools("deepseek_v31"),
        f"{_DS[1]}now{_DS[2]}what{_DS[3]}x",
        "x",
        calls=(("now", "what"),),
    ),
    Case(
        "deepseek v3 nothing in the fence",
        _tools("deepseek_v3"),
        f"{_DS[0]}{_DS[1]}function{_DS[2]}now\n```json\n```{_DS[3]}\n{_DS[1]}function{_DS[2]}now\n```json\n\n```{_DS[3]}{_DS[4]}x",
        "x",
        calls=(NOW, NOW),
    ),
    Case("deepseek nothing", _tools("deepseek_v31"), f"{_DS[1]}now{_DS[2]}\n{_DS[3]}{_DS[1]}now{_DS[2]}{_DS[4]}", calls=(NOW, NOW)),
    Case(
        "deepseek fence without JSON",
        _tools("deepseek_v3"),
        f"{_DS[1]}function{_DS[2]}now\n```json\n``` what{_DS[3]}",
        calls=(("now", "``` what"),),
    ),
    # Kimi K2.
    Case("kimi nothing", _tools("kimi_k2"), f"{_KIMI[1]}functions.now:0{_KIMI[2]} {_KIMI[3]}{_KIMI[4]}", calls=(NOW,)),
    Case("kimi ends", _tools("kimi_k2"), f"{_KIMI[1]}functions.now:0{_KIMI[2]}", calls=(NOW,)),
    Case(
        "kimi",
        _tools("kimi_k2"),
        f'Ok.{_KIMI[0]}{_KIMI[1]}functions.get_weather:0{_KIMI[2]}{{"city": "Paris"}}{_KIMI[3]}'
        f"{_KIMI[1]}functions.now:1{_KIMI[2]}{{}}{_KIMI[3]}{_KIMI[4]}",
        "Ok.",
        calls=(PARIS, NOW),
        ids=("functions.get_weather:0", "functions.now:1"),
    ),
    # GLM.
    Case(
        "glm",
        _tools("glm", reasoning="glm"),
        '\n<think>Weather?</think>\nOk.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Pa"r\nis</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "Ok.",
        "Weather?",
        calls=(("get_weather", {"city": 'Pa"r\nis', "days": 3}), NOW),
    ),
    Case(
        "glm strings that look like JSON",
        _tools("glm"),
        "<tool_call>get_weather<arg_key>note</arg_key><arg_value>None of it</arg_value><arg_key>zip</arg_key>"
        "<arg_value>7</arg_value><arg_key>days</arg_key><arg_value>7</arg_value></tool_call>",
        calls=(("get_weather", {"note": "None of it", "zip": "7", "days": 7}),),
    ),
    Case("glm broken", _tools("glm"), "<tool_call>now or never</tool_call>", "<tool_call>now or never</tool_call>"),
    # Qwen3-Coder and MiniMax.
    Case(
        "qwen3-coder",
        _tools("qwen3_coder"),
        "I look.\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>\n12\n3 < 4\n</parameter>\n<parameter=days>\n7\n</parameter>\n"
        "<parameter=units>\nTrue\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        calls=(("get_weather", {"city": "12\n3 < 4", "days": 7, "units": True}), NOW),
    ),
    Case(
        "qwen3-coder strings that look like JSON",
        _tools("qwen3_coder"),
        "<function=get_weather><parameter=note>\n12\n</parameter><parameter=zip>01234</parameter><parameter=zone>\n"
        '{"a": 1}\n</parameter><parameter=kind>true</parameter></function>',
        calls=(("get_weather", {"note": "12", "zip": "01234", "zone": '{"a": 1}', "kind": "true"}),),
    ),
    Case(
        "qwen3-coder null for what may be a string",
        _tools("qwen3_coder"),
        "<function=get_weather>\n<parameter=note>\nnull\n</parameter>\n<parameter=zip>\nNone\n</parameter>\n"
        "<parameter=city>\nnull\n</parameter>\n<parameter=zone>\nNone\n</parameter>\n</function>",
        calls=(("get_weather", {"note": None, "zip": None, "city": "null", "zone": "None"}),),
    ),
    Case(
        "qwen3-coder almost null",
        _tools("qwen3_coder"),
        "<function=get_weather><parameter=note>nul</parameter><parameter=zip></parameter></function>",
        calls=(("get_weather", {"note": "nul", "zip": ""}),),
    ),
    Case(
        "qwen3-coder null cut",
        _tools("qwen3_coder"),
        "<function=get_weather><parameter=note>nul",
        calls=(("get_weather", '{"note": nul'),),
    ),
    Case("qwen3-coder bare", _tools("qwen3_coder"), "<function=now>\n</function>\n</tool_call>", calls=(NOW,)),
    Case(
        "qwen3-coder cut",
        _tools("qwen3_coder"),
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar",
        calls=(("get_weather", '{"city": "Par'),),
    ),
    Case(
        "qwen3-coder unknown",
        _tools("qwen3_coder"),
        "<tool_call>\n<function=rm>\n</function>",
        "<tool_call>\n<function=rm>\n</function>",
    ),
    Case(
        "minimax",
        _tools("minimax", reasoning="minimax", inside=True),
        'Hm.\n</think>\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        reasoning="Hm.",
        calls=(PARIS, NOW),
    ),
    Case(
        "minimax strings that look like JSON",
        _tools("minimax"),
        '<invoke name="get_weather"><parameter name="note">[1]</parameter><parameter name="zip">null</parameter></invoke>',
        calls=(("get_weather", {"note": "[1]", "zip": None}),),
    ),
    # GPT-OSS.
    Case(
        "harmony",
        _tools("gpt_oss", reasoning="gpt_oss"),
        "<|channel|>analysis<|message|>Weather?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "I look.",
        "Weather?",
        calls=(PARIS,),
    ),
    Case(
        "harmony final",
        _tools("gpt_oss", reasoning="gpt_oss"),
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello.",
        "Hello.",
        "Easy.",
    ),
    Case(
        "harmony recipient first",
        _tools("gpt_oss", reasoning="gpt_oss"),
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
        calls=(NOW,),
    ),
    Case(
        "harmony call of nothing",
        _tools("gpt_oss", reasoning="gpt_oss"),
        "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|> <|call|><|start|>assistant"
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.now<|message|>",
        reasoning="Hm.",
        calls=(NOW, NOW),
    ),
    Case("harmony none", _tools("gpt_oss", reasoning="gpt_oss"), "Just words.", "Just words."),
    # Reasoning.
    Case("qwen3", ReadingOptions("", "qwen3"), "<think>\nwhy? \n\n</think>\n\nBecause.", "Because.", "why?"),
    Case("qwen3 empty", ReadingOptions("", "qwen3"), "<think>\n\n</think>\n\nBecause.", "Because."),
    Case("qwen3 none", ReadingOptions("", "qwen3"), " Because <think>.</think>", " Because <think>.</think>"),
    Case("qwen3 second block", ReadingOptions("", "qwen3"), "<think>a</think>b<think>c</think>", "b<think>c</think>", "a"),
    Case("qwen3 cut", ReadingOptions("", "qwen3"), "<think>\nwhy </thi", "", "why </thi"),
    Case("deepseek-r1", ReadingOptions("", "deepseek_r1", True), "why?</think>Because.", "Because.", "why?"),
    Case("deepseek-r1 opened twice", ReadingOptions("", "deepseek_r1", True), "<think>why?</think>Because.", "Because.", "why?"),
    Case("qwen3-thinking cut", ReadingOptions("", "qwen3_thinking", True), "why", "", "why"),
    Case("nemotron", ReadingOptions("", "nemotron_nano_v3", True), "why\n</think>\n\nBecause.", "Because.", "why"),
    Case("kimi", ReadingOptions("", "kimi"), "◁think▷why◁/think▷Because.", "Because.", "why"),
    Case(
        "kept in the text",
        ReadingOptions("", "qwen3", keeps_reasoning_in_text=True),
        "<think>\nwhy\n</think>\n\nBecause.",
        "<think>\nwhy\n</think>\n\nBecause.",
    ),
    Case(
        "kept, a call in it",
        ReadingOptions("hermes", "qwen3", False, TOOLS, keeps_reasoning_in_text=True),
        '<think><tool_call>{"name": "now"}</tool_call></think>\n<tool_call>{"name": "now"}</tool_call>',
        '<think><tool_call>{"name": "now"}</tool_call></think>',
        calls=(NOW,),
    ),
    Case(
        "held",
        ReadingOptions("hermes", "qwen3", False, TOOLS, holds_reasoning=True),
        '<think>why</think>\n<tool_call>{"name": "now"}</tool_call>',
        reasoning="why",
        calls=(NOW,),
    ),
]
