"""What `headrace models list` and `show` print, as rows of text: the command line draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from headrace.errors import ModelError
from headrace.models.description import ModelDescription, describe
from headrace.models.store import list_models

LIST_HEADER: Final = ("name", "architecture", "parameters", "context", "weights", "size")
"""Column titles of `list_rows`."""

_UNITS: Final = ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k"))


def list_rows(root: Path) -> list[tuple[str, ...]]:
    """Give a row for each model under the root; a damaged one has a row too, with the reason in place of its figures."""
    rows: list[tuple[str, ...]] = []
    for entry in list_models(root):
        try:
            model = describe(entry.path)
        except ModelError as error:
            rows.append((entry.name, f"damaged: {error.message}", "", "", "", ""))
            continue
        rows.append(
            (
                entry.name,
                model.architecture,
                short_count(model.num_parameters),
                f"{model.context_length}",
                model.quantisation,
                f"{short_count(model.size_bytes)}B",
            )
        )
    return rows


def show_rows(model: ModelDescription) -> list[tuple[str, str]]:
    """Give the facts of one model as pairs of title and text, its files last."""
    by_dtype = ", ".join(f"{dtype} {short_count(count)}" for dtype, count in model.num_parameters_by_dtype.items())
    rows = [
        ("name", model.name),
        ("path", str(model.path)),
        ("architecture", model.architecture),
        ("parameters", f"{short_count(model.num_parameters)} ({model.num_parameters})"),
        ("weights", by_dtype),
        ("context length", f"{model.context_length} tokens"),
        ("vocabulary", f"{model.vocab_size} tokens"),
        ("chat template", "yes" if model.has_chat_template else "no"),
        ("size", f"{short_count(model.size_bytes)}B"),
    ]
    return rows + [("file", f"{file.name} ({short_count(file.size_bytes)}B)") for file in model.files]


def short_count(count: int) -> str:
    """Write a count with one decimal and a decimal prefix: 134515008 is `134.5 M`."""
    for unit, suffix in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {suffix}"
    return f"{count} "
