"""Structural tags: where in an output constrained parts begin and end, as rules of a grammar.

Two forms are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and a tree of formats under `"format"`, of
the types in `_FORMATS` below. Special tokens in the texts of tags are matched as the tokens they are.

Free text ends where the fixed text behind it comes for the first time: a constant, the beginning or end of a tag, or one of several
of these. So each format is written together with what comes behind it. What begins with no fixed text cannot stand behind free
text, which would take it for its own, and is refused with its path. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.tokenizer.constraints.json_schema import SchemaError, enforceable
from services.tokenizer.constraints.literals import ANY_TEXT, Literals, escaped, quoted

MAX_PARTS: Final = 1024
MAX_DEPTH: Final = 32


@dataclass(frozen=True, slots=True)
class _Head:
    """One way in which an output goes on: a fixed text, and an expression for what is behind that."""

    begin: str
    rest: str


_Then = tuple[_Head, ...]
"""All ways in which an output goes on; none where it ends."""
_Places = Sequence[tuple[Any, str]]
"""Formats, each with its path."""


class TagGrammar:
    """Builds one grammar.

    Args:
        literals: Of the model's vocabulary.
        options: What the compiler is told with every schema.
        excluded_start: A regular expression of what free text must not begin with; empty for nothing.
    """

    def __init__(self, literals: Literals, options: Mapping[str, Any], *, excluded_start: str = "") -> None:
        self.literals = literals
        self.options = options
        self._rules: list[str] = []
        self._begun: dict[_Then, str] = {}
        self._num_parts = 0
        self._but = f" & ~/{excluded_start}/" if excluded_start else ""

    def grammar(self, source: object) -> str:
        """The grammar of a structural tag, for the compiler.

        Raises:
            SchemaError: It is none, or has something that is not supported; names the path.
        """
        if not isinstance(source, dict):
            raise SchemaError("#", "must be an object")
        is_tree = "format" in source
        start = self.format(source["format"] if is_tree else _as_format(source), "#/format" if is_tree else "#", 1)
        rules = "\n".join(["%llguidance {}", f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": rules}]}, ensure_ascii=False)

    def format(self, value: Any, path: str, depth: int, then: _Then = ()) -> str:
        """An expression for a format and what comes behind it."""
        self._count(path, depth)
        if not isinstance(value, dict):
            raise SchemaError(path, "must be an object with a type")
        kind = value.get("type")
        build = _FORMATS.get(kind) if isinstance(kind, str) else None
        if build is None:
            raise SchemaError(f"{path}/type", f"must be one of {', '.join(_FORMATS)}")
        return build(self, value, path, depth, then)

    def begun(self, then: _Then) -> str:
        """What comes behind something that has an end of its own."""
        if then and then not in self._begun:
            self._begun[then] = self.rule(" | ".join(f"{self.literals.write(head.begin)} {head.rest}" for head in then))
        return self._begun[then] if then else ""

    def text(self, then: _Then, marks: Sequence[str] = ()) -> str:
        """Free text and what comes behind it; `marks` are other texts by which it would end."""
        if not then:
            return self.rule(f"/{ANY_TEXT}/{self._but}", is_token=True)
        marks = [mark for mark in (*marks, *(head.begin for head in then)) if mark]
        found = []
        for head in then:
            # The first to be complete ends the text: of one that begins with another the rest comes behind.
            mark = min((mark for mark in marks if head.begin.startswith(mark)), key=len)
            found.append(f"{self._until(mark)} {self.literals.write(head.begin[len(mark) :])} {head.rest}")
        return f"({' | '.join(found)})"

    def _until(self, mark: str) -> str:
        text, special, rest = self.literals.split(mark)
        if not special:
            token = self.rule(f"/{ANY_TEXT}/{self._but}", is_token=True)
            return self.rule(f"{token} {quoted(mark)}", options="[lazy]")
        # No special token is part of a text, so that it ends before one by itself.
        return f"{self.rule(f'/{ANY_TEXT}{escaped(text)}/{self._but}', is_token=True)} {self.literals.write(special + rest)}"

    def run(self, elements: _Places, depth: int, then: _Then) -> str:
        """An expression for formats one after the other and what comes behind them."""
        parts: list[str] = []
        for index, (element, path) in enumerate(elements):
            others = elements[index + 1 :]
            if not others:
                return " ".join([*parts, self.format(element, path, depth, then)])
            if _is_open(element):
                return " ".join([*parts, self.format(element, path, depth, self._heads(others, depth, then))])
            parts.append(self.format(element, path, depth))
        return self.begun(then)

    def _heads(self, elements: _Places, depth: int, then: _Then) -> _Then:
        """The fixed texts with which formats begin that stand behind free text, each with all that comes behind it."""
        (first, path), others = elements[0], elements[1:]
        self._count(path, depth)
        kind = first.get("type") if isinstance(first, dict) else None
        if kind == "sequence":
            return self._heads([*_places(first, path), *others], depth + 1, then)
        if kind not in ("const_string", "tag", "or"):
            raise SchemaError(path, "begins with no fixed text, and stands behind free text, which must end by one")
        if others:
            # Written once, whatever comes before it.
            then = self._heads(others, depth, then) if _is_open(first) else (_Head("", self.run(others, depth, then)),)
        if kind == "or":
            return tuple(head for place in _places(first, path) for head in self._heads([place], depth + 1, then))
        if kind == "const_string":
            return (_Head(_text(first, "value", path), self.begun(then)),)
        return (_Head(_text(first, "begin", path), self.rule(self.body(first, path, depth, then))),)

    def body(self, tag: dict[str, Any], path: str, depth: int, then: _Then) -> str:
        """What stands in a tag, with its end and what comes behind that."""
        end = tag.get("end", "")
        if not isinstance(end, str):
            raise SchemaError(f"{path}/end", "must be a string")
        inner = (_Head(end, self.begun(then)),) if end else then
        return self.format(tag.get("content"), f"{path}/content", depth + 1, inner)

    def rule(self, body: str, *, is_token: bool = False, options: str = "") -> str:
        """A rule of its own; gives its name."""
        name = f"P{len(self._rules)}" if is_token else f"p{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _count(self, path: str, depth: int) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS or depth > MAX_DEPTH:
            raise SchemaError(path, f"a structural tag may have {MAX_PARTS} parts, {MAX_DEPTH} inside one another")


def _write_const_string(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return f"{build.literals.write(_text(value, 'value', path))} {build.begun(then)}"


def _write_any_text(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return build.text(then)


def _write_json_schema(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    if value.get("style", "json") != "json":
        raise SchemaError(f"{path}/style", "must be json")
    try:
        schema = enforceable(value.get("json_schema"))
    except SchemaError as error:
        raise SchemaError(f"{path}/json_schema{error.path[1:]}", error.reason) from error
    found = build.rule(f"%json {json.dumps({**schema, 'x-guidance': build.options}, ensure_ascii=False)}")
    return f"{found} {build.begun(then)}"


def _write_regex(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return f"{build.rule(regex_literal(_text(value, 'pattern', path)), is_token=True)} {build.begun(then)}"


def _write_sequence(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return f"({build.run(_places(value, path), depth + 1, then)})"


def _write_or(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return f"({' | '.join(build.format(each, place, depth + 1, then) for each, place in _places(value, path))})"


def _write_tag(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    return f"({build.literals.write(_text(value, 'begin', path))} {build.body(value, path, depth, then)})"


def _write_triggered_tags(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    triggers = [_string(each, f"{path}/triggers/{index}") for index, each in enumerate(_list(value, "triggers", path))]
    is_one, marks = bool(value.get("stop_after_first")), [*triggers, *(head.begin for head in then)]
    options = []
    for tag, place in _places(value, path, "tags"):
        begin = _text(tag, "begin", place)
        if not begin.startswith(tuple(triggers)):
            raise SchemaError(f"{place}/begin", f"must begin with one of the triggers {triggers}")
        if not is_one:
            _check_end(tag, place)
        options.append(build.text((_Head(begin, build.body(tag, place, depth, then if is_one else ())),), marks))
    tags = f"({' | '.join(options)})"
    if is_one:
        return tags if value.get("at_least_one") else f"({tags} | {build.text(then, marks)})"
    return f"({tags}{'+' if value.get('at_least_one') else '*'} {build.text(then, marks)})"


def _write_tags_with_separator(build: TagGrammar, value: dict[str, Any], path: str, depth: int, then: _Then) -> str:
    separator = build.literals.write(_text(value, "separator", path))
    tags = []
    for tag, place in _places(value, path, "tags"):
        _check_end(tag, place)
        tags.append(_write_tag(build, tag, place, depth, ()))
    one = build.rule(" | ".join(tags))
    several = one if value.get("stop_after_first") else f"({one} ({separator} {one})*)"
    return f"{several if value.get('at_least_one') else f'({several})?'} {build.begun(then)}"


_FORMATS: Final[dict[str, Callable[[TagGrammar, dict[str, Any], str, int, _Then], str]]] = {
    "const_string": _write_const_string,
    "json_schema": _write_json_schema,
    "regex": _write_regex,
    "any_text": _write_any_text,
    "sequence": _write_sequence,
    "or": _write_or,
    "tag": _write_tag,
    "triggered_tags": _write_triggered_tags,
    "tags_with_separator": _write_tags_with_separator,
}


def _is_open(value: Any) -> bool:
    """Whether a format may end with free text, which goes on until something else comes."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("sequence", "or"):
        return any(_is_open(each) for each in _members(value, "elements")[-1 if kind == "sequence" else 0 :])
    if kind == "tag":
        return not value.get("end") and _is_open(value.get("content"))
    if kind == "triggered_tags" and value.get("stop_after_first") and value.get("at_least_one"):
        return any(_is_open({**tag, "type": "tag"}) for tag in _members(value, "tags") if isinstance(tag, dict))
    return kind in ("any_text", "triggered_tags")


def _members(value: dict[str, Any], name: str) -> list[Any]:
    """Those of a format that has not been checked yet."""
    found = value.get(name)
    return found if isinstance(found, list) else []


def _check_end(tag: Any, path: str) -> None:
    if isinstance(tag, dict) and _is_open({**tag, "type": "tag"}):
        raise SchemaError(f"{path}/end", "must be a text: nothing else ends the free text before it")


def _places(value: Any, path: str, name: str = "elements") -> list[tuple[Any, str]]:
    return [(each, f"{path}/{name}/{index}") for index, each in enumerate(_list(value, name, path))]


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
