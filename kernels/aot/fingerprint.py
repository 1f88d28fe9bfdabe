"""What a compiled case is made of, as a short digest: the page of resources keeps it, so a kernel that changed since cannot hide.

Digested are the kernel's file and the files of ours that it imports, without comments, docstrings and layout, and the case's types,
constants and configuration. Triton's version stands on the page by itself.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from kernels.aot.registry import KERNELS, RegisteredCase

NUM_DIGITS: Final = 8


def fingerprints(cases: Iterable[RegisteredCase]) -> dict[str, str]:
    """Digest all cases: a fingerprint for each row of the page."""
    rows: dict[str, list[RegisteredCase]] = {}
    for each in cases:
        rows.setdefault(each.row, []).append(each)
    return {row: fingerprint_of(members) for row, members in rows.items()}


def fingerprint_of(cases: Iterable[RegisteredCase]) -> str:
    """Digest the cases of one row, in order of their architectures."""
    digest = hashlib.sha256()
    for each in sorted(cases, key=lambda each: each.key):
        case = each.case
        digest.update(_source_of(KERNELS / each.op / "kernel.py").encode())
        parts = (each.key, dict(case.types), dict(case.constants), case.config.options(), sorted(case.unaligned))
        digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:NUM_DIGITS]


@cache
def _source_of(path: Path) -> str:
    """Give the meaning of a file and of all of ours that it imports, as text."""
    tree = ast.parse(path.read_text())
    imported = sorted(
        KERNELS.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kernels.")
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    # Unparsed: dumps of the tree differ between versions of Python.
    return ast.unparse(tree) + "".join(_source_of(each) for each in imported)
