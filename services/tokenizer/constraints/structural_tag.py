"""Structural tags: where in an output constrained parts begin and end, as rules of a grammar.

Two forms are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and a tree of formats under `"format"`, of
the types in `_FORMATS` below. Special tokens in the texts of tags are matched as the tokens they are. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from services.tokenizer.constraints.json_schema import SchemaError, enforceable
from services.tokenizer.constraints.literals import ANY_TEXT, Literals

MAX_PARTS: Final = 1024
MAX_DEPTH: Final = 32


class TagGrammar:
    """Builds one grammar.

    Args:
        literals: Of the model's vocabulary.
        options: What the compiler is told with every schema.
        excluded_start: A regular expression of what free text must not begin with; empty for nothing.
    """

    def __init__(self, literals: Literals, options: Mapping[str, Any], *, excluded_start: str = "") -> None:
        self._rules: list[str] = []
        self._others: list[dict[str, Any]] = []
        self._options = options
        self._num_parts = 0
        self._literals = literals
        self._any = f"/{ANY_TEXT}/" + (f" & ~/{excluded_start}/" if excluded_start else "")

    def grammar(self, source: object) -> str:
        """The grammar of a structural tag, for the compiler.

        Raises:
            SchemaError: It is none, or has something that is not supported; names the path.
        """
        if not isinstance(source, dict):
            raise SchemaError("#", "must be an object")
        is_tree = "format" in source
        start = self._format(source["format"] if is_tree else _as_format(source), "#/format" if is_tree else "#", 1)
        rules = "\n".join(["%llguidance {}", f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": rules}, *self._others]}, ensure_ascii=False)

    def _format(self, value: Any, path: str, depth: int, *, end: str | None = None) -> str:
        """An expression for a format; with `end`, free text in it goes on until that, which is a part of it then."""
        self._num_parts += 1
        if self._num_parts > MAX_PARTS or depth > MAX_DEPTH:
            raise SchemaError(path, f"a structural tag may have {MAX_PARTS} parts, {MAX_DEPTH} inside one another")
        if not isinstance(value, dict):
            raise SchemaError(path, "must be an object with a type")
        kind = value.get("type")
        build = _FORMATS.get(kind) if isinstance(kind, str) else None
        if build is None:
            raise SchemaError(f"{path}/type", f"must be one of {', '.join(_FORMATS)}")
        if kind == "any_text":
            return self._any_text(end)
        expression = build(self, value, path, depth)
        return f"{expression} {self._literals.write(end)}" if end else expression

    def _any_text(self, end: str | None) -> str:
        if not end:
            return self._rule(self._any, is_token=True)
        if self._literals.is_special(end):
            return f"{self._rule(self._any, is_token=True)} {self._literals.write(end)}"
        text = self._rule(self._any, is_token=True)
        return self._rule(f"{text} {json.dumps(end, ensure_ascii=False)}", options="[lazy]")

    def _const_string(self, value: dict[str, Any], path: str, depth: int) -> str:
        return self._literals.write(_text(value, "value", path))

    def _json_schema(self, value: dict[str, Any], path: str, depth: int) -> str:
        if value.get("style", "json") != "json":
            raise SchemaError(f"{path}/style", "must be json")
        try:
            schema = enforceable(value.get("json_schema"))
        except SchemaError as error:
            raise SchemaError(f"{path}/json_schema{error.path[1:]}", error.reason) from error
        return self._rule(f"%json {json.dumps({**schema, 'x-guidance': self._options}, ensure_ascii=False)}")

    def _regex(self, value: dict[str, Any], path: str, depth: int) -> str:
        return self._rule(regex_literal(_text(value, "pattern", path)), is_token=True)

    def _sequence(self, value: dict[str, Any], path: str, depth: int) -> str:
        elements = _list(value, "elements", path)
        parts = []
        for index, element in enumerate(elements):
            following = elements[index + 1] if index + 1 < len(elements) else None
            end = following.get("value") if isinstance(following, dict) and following.get("type") == "const_string" else None
            is_text = isinstance(element, dict) and element.get("type") == "any_text"
            before = elements[index - 1] if index else None
            if isinstance(before, dict) and before.get("type") == "any_text" and isinstance(element, dict) and element.get("value"):
                # The text before has taken it.
                continue
            parts.append(self._format(element, f"{path}/elements/{index}", depth + 1, end=end if is_text else None))
        return f"({' '.join(parts)})"

    def _or(self, value: dict[str, Any], path: str, depth: int) -> str:
        elements = _list(value, "elements", path)
        parts = [self._format(element, f"{path}/elements/{index}", depth + 1) for index, element in enumerate(elements)]
        return f"({' | '.join(parts)})"

    def _tag(self, value: dict[str, Any], path: str, depth: int) -> str:
        return f"({self._literals.write(_text(value, 'begin', path))} {self._body(value, path, depth)})"

    def _body(self, tag: dict[str, Any], path: str, depth: int) -> str:
        end = tag.get("end", "")
        if not isinstance(end, str):
            raise SchemaError(f"{path}/end", "must be a string")
        return self._format(tag.get("content"), f"{path}/content", depth + 1, end=end or None)

    def _triggered_tags(self, value: dict[str, Any], path: str, depth: int) -> str:
        triggers = [_string(each, f"{path}/triggers/{index}") for index, each in enumerate(_list(value, "triggers", path))]
        options = []
        for index, tag in enumerate(_list(value, "tags", path)):
            place = f"{path}/tags/{index}"
            begin = _text(tag, "begin", place)
            trigger = next((each for each in triggers if begin.startswith(each)), None)
            if trigger is None:
                raise SchemaError(f"{place}/begin", f"must begin with one of the triggers {triggers}")
            rest = self._literals.write(begin[len(trigger) :])
            options.append(f"{self._any_text(trigger)} {rest} {self._body(tag, place, depth)}")
        tags = f"({' | '.join(options)})"
        if value.get("stop_after_first"):
            return tags if value.get("at_least_one") else f"({tags} | {self._any_text(None)})"
        return f"({tags}{'+' if value.get('at_least_one') else '*'} {self._any_text(None)})"

    def _tags_with_separator(self, value: dict[str, Any], path: str, depth: int) -> str:
        tags = [self._tag(tag, f"{path}/tags/{index}", depth) for index, tag in enumerate(_list(value, "tags", path))]
        one = self._rule(" | ".join(tags))
        separator = self._literals.write(_text(value, "separator", path))
        several = one if value.get("stop_after_first") else f"({one} ({separator} {one})*)"
        return several if value.get("at_least_one") else f"({several})?"

    def _rule(self, body: str, *, is_token: bool = False, options: str = "") -> str:
        name = f"P{len(self._rules)}" if is_token else f"p{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name


_FORMATS: Final[dict[str, Callable[[TagGrammar, dict[str, Any], str, int], str]]] = {
    "const_string": TagGrammar._const_string,
    "json_schema": TagGrammar._json_schema,
    "regex": TagGrammar._regex,
    "any_text": TagGrammar._const_string,
    "sequence": TagGrammar._sequence,
    "or": TagGrammar._or,
    "tag": TagGrammar._tag,
    "triggered_tags": TagGrammar._triggered_tags,
    "tags_with_separator": TagGrammar._tags_with_separator,
}


def regex_literal(pattern: str) -> str:
    """A regular expression between slashes, as the grammar's language has it."""
    escaped = re.sub(r"\\.|/|\n", lambda match: {"/": r"\/", "\n": r"\n"}.get(match.group(), match.group()), pattern, flags=re.S)
    return f"/{escaped}/"


def _as_format(source: dict[str, Any]) -> dict[str, Any]:
    """The older form as the newer one."""
    structures = _list(source, "structures", "#")
    for index, structure in enumerate(structures):
        if not isinstance(structure, dict):
            raise SchemaError(f"#/structures/{index}", "must be an object")
    tags = [
        {
            "begin": structure.get("begin"),
            "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
            "end": structure.get("end", ""),
        }
        for structure in structures
    ]
    return {"type": "triggered_tags", "triggers": source.get("triggers"), "tags": tags}


def _list(value: Any, name: str, path: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list) or not found:
        raise SchemaError(f"{path}/{name}", "must be a non-empty array")
    return found


def _text(value: Any, name: str, path: str) -> str:
    return _string(value.get(name) if isinstance(value, dict) else None, f"{path}/{name}")


def _string(value: object, path: str) -> str:
    if not isinstance(value, str) or not value:
        raise SchemaError(path, "must be a non-empty string")
    return value
