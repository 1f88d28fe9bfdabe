"""From a constraint as a client wrote it to a grammar as workers take it. Runs in the child, see `compiler.py`. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llguidance.gbnf_to_lark import gbnf_to_lark

from headrace.errors import InvalidRequestError
from headrace.grammars import GrammarError, Vocabulary, compile_grammar
from services.tokenizer.constraints.call_grammar import CallGrammar, takes_call_grammar
from services.tokenizer.constraints.json_schema import RESTRICTING, Schema, SchemaError, enforceable, subschemas
from services.tokenizer.constraints.literals import Literals
from services.tokenizer.constraints.reasoning_first import Block, with_reasoning
from services.tokenizer.constraints.structural_tag import TagGrammar, regex_literal

JSON_OPTIONS: Final[dict[str, Any]] = {
    # A bound: small models love to fill a page with blanks. An indent of eight levels of four fits.
    "whitespace_pattern": r"[ \n\r\t]{1,40}",
    "coerce_one_of": False,
    "lenient": False,
}
MAX_CHOICES: Final = 4096
_PROBES_MAX: Final = 256
_LARK: Final = re.compile(r"^[ \t]*(%llguidance\b|[?!]{0,2}start\b[^:\n]*:(?!:=))", re.MULTILINE)
"""What only Lark has: its first rule, in every form, such as `?start:`. In GBNF a rule's name stands before `::=`."""


@dataclass(frozen=True, slots=True)
class ModelText:
    """How a model writes what a constraint stands between.

    Attributes:
        special_tokens: Ids of its special tokens by their texts.
        tool_format: How it writes tool calls; empty when nothing is known.
        block: The block of reasoning that the output may begin with; None for none.
    """

    special_tokens: Mapping[str, int]
    tool_format: str = ""
    block: Block | None = None


def grammar_of(kind: str, source: str, *, param: str, vocabulary: Vocabulary, model: ModelText) -> str:
    """Turn a constraint into a grammar that compiles and that something matches.

    Args:
        kind: One of the kinds of the wire's Constraint, in lower case.
        source: What the client wrote.
        param: The client's field, named in errors.
        vocabulary: The model's.
        model: How the model writes what the constraint stands between.

    Returns:
        The grammar; empty where the format of the model's calls lets nothing be enforced under `tool_choice: auto`.

    Raises:
        InvalidRequestError: Says what is wrong, and where in the source.
    """
    literals, block = Literals(model.special_tokens), model.block
    excluded = "" if block is None else block.excluded_start(literals)
    try:
        if kind == "tool_calls":
            if not takes_call_grammar(model.tool_format):
                return ""
            grammar = _of_calls(_json(source), vocabulary, CallGrammar(literals, JSON_OPTIONS, excluded_start=excluded), model)
        elif kind in ("json_schema", "json_object"):
            grammar = _of_schema(_json(source) if kind == "json_schema" else {"type": "object"}, vocabulary)
        elif kind == "structural_tag":
            grammar = TagGrammar(literals, JSON_OPTIONS, excluded_start=excluded).grammar(_json(source))
        elif kind == "regex":
            grammar = _lark(f"start: {regex_literal(_unanchored(source))}")
        elif kind == "choice":
            grammar = _of_choices(_json(source))
        elif kind == "ebnf":
            grammar = _of_ebnf(source)
        else:
            raise InvalidRequestError(f"{param}: constraints of kind {kind!r} are not known here", param=param)
        if block is not None:
            grammar = with_reasoning(grammar, block, literals)
        if block is not None or kind not in ("json_schema", "json_object", "tool_calls"):
            compile_grammar(vocabulary, grammar)
    except SchemaError as error:
        raise InvalidRequestError(f"{param}: {_NAMES[kind]} at {error.path}: {error.reason}", param=param) from error
    except GrammarError as error:
        raise InvalidRequestError(f"{param}: {_NAMES[kind]} cannot be used: {error}", param=param) from error
    except RecursionError as error:
        raise InvalidRequestError(f"{param}: {_NAMES[kind]} is nested too deeply", param=param) from error
    return grammar


_NAMES: Final = {
    "json_schema": "the schema",
    "json_object": "the schema",
    "structural_tag": "the structural tag",
    "tool_calls": "the strict tools",
    "regex": "the regular expression",
    "choice": "the choice",
    "ebnf": "the grammar",
}


def _json(source: str) -> object:
    try:
        return json.loads(source)
    except ValueError as error:
        raise SchemaError("#", f"is not valid JSON: {error}") from error


def _of_schema(schema: object, vocabulary: Vocabulary) -> str:
    kept = enforceable(schema)
    grammar = _schema_grammar(kept)
    try:
        compile_grammar(vocabulary, grammar)
    except GrammarError as error:
        reason = str(error)
        if reason.startswith("oneOf"):
            reason = "alternatives of oneOf that may overlap cannot be enforced; use anyOf"
        raise SchemaError(_place_of(kept, vocabulary), reason) from error
    return grammar


def _of_calls(source: Any, vocabulary: Vocabulary, build: CallGrammar, model: ModelText) -> str:
    grammar = build.grammar(source, model.tool_format)
    try:
        compile_grammar(vocabulary, grammar)
    except GrammarError:
        for index, tool in enumerate(source["tools"]):
            try:
                _of_schema(tool["parameters"] if tool["is_strict"] and tool["parameters"] else True, vocabulary)
            except SchemaError as error:
                raise SchemaError(f"#/tools/{index}/parameters{error.path[1:]}", error.reason) from error
        raise
    return grammar


def _schema_grammar(schema: Schema) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}]}, ensure_ascii=False)


def _place_of(schema: Schema, vocabulary: Vocabulary) -> str:
    """Where in a schema that does not compile the reason is: the innermost part that does not compile alone."""
    definitions = {name: value for name, value in schema.items() if name not in RESTRICTING}
    for number, (path, part) in enumerate(subschemas(schema)):
        if number == _PROBES_MAX:
            break
        try:
            compile_grammar(vocabulary, _schema_grammar({**definitions, **part}))
        except GrammarError as error:
            # A reference to a place that is not in the part says nothing of it.
            if not str(error).startswith("Pointer"):
                return path
    return "#"


def _lark(rules: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": rules}]}, ensure_ascii=False)


def _unanchored(pattern: str) -> str:
    """The whole output is matched anyway."""
    if not pattern:
        raise GrammarError("it is empty")
    pattern = pattern.removeprefix("^")
    return pattern[:-1] if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) else pattern


def _of_choices(choices: object) -> str:
    if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
        raise SchemaError("#", f"must be an array of 1 to {MAX_CHOICES} strings")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise SchemaError(f"#/{index}", "must be a non-empty string")
    return _lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def _of_ebnf(source: str) -> str:
    try:
        rules = source if _LARK.search(source) else gbnf_to_lark(source)
    except Exception as error:
        raise GrammarError(f"it is neither GBNF nor Lark: {error}") from error
    return _lark(rules)
