"""What a chat template's source says of the template, found without running or compiling it. Pure.

Compiling works constant expressions out, so that a short template could make a process long and large; the renderer does that, in a
process of its own. Here each constant is replaced by a variable first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock, Const, Name, Node
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's own words for training; for serving it only passes them on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        """Read the tag with what it holds."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

    def _pass_on(self, caller: Callable[[], str]) -> str:
        return caller()


EXTENSIONS: Final[list[type[Extension]]] = [GenerationTag, loopcontrols]


def takes_tools(template: str) -> bool:
    """Whether a template shows the request's tools to the model: whether it reads the variable of that name.

    It may well have the word otherwise: Phi-4-mini's reads `message['tools']`. One that cannot be read is refused elsewhere.
    """
    if "tools" not in template:
        return False
    environment = jinja2.Environment(extensions=EXTENSIONS)
    try:
        return "tools" in find_undeclared_variables(_WithoutConstants().visit(environment.parse(template)))
    except (jinja2.TemplateError, RecursionError):
        return True


class _WithoutConstants(NodeTransformer):
    def visit_Const(self, node: Const, *args: Any, **kwargs: Any) -> Node:
        return Name("constant", "load", lineno=node.lineno, environment=node.environment)
