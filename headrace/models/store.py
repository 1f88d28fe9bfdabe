"""Where models live: one directory a model, in Hugging Face layout, under a root that the settings name.

Names that start with a dot are a pull's own (locks, unfinished downloads) and are never listed or resolved. A hub id `org/name` is
stored as `org--name` and may be written either way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from headrace.errors import ModelError
from headrace.home import expand_home
from headrace.models.model_config import CONFIG_FILE

DEFAULT_MODELS_ROOT: Final = Path("~/.cache/headrace/models")
"""Where models are kept unless the settings say otherwise; `~` is not expanded yet."""

_NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HUB_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_SEPARATOR: Final = "--"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model directory under the root: the name to ask for it by, and its path."""

    name: str
    path: Path


def is_hub_id(text: str) -> bool:
    """Say whether a text has the form `org/name`."""
    return _HUB_ID_PATTERN.fullmatch(text) is not None


def directory_name(name: str) -> str:
    """Give the directory name of a model name or hub id.

    Raises:
        ModelError: The name cannot be a directory's: empty, hidden, or with other characters than letters, digits and `._-`.
    """
    stored = name.replace("/", _HUB_SEPARATOR) if is_hub_id(name) else name
    if _NAME_PATTERN.fullmatch(stored) is None:
        raise ModelError(f"{name!r} is not a model name: use letters, digits, '.', '_' and '-', at most 128, or a hub id org/name")
    return stored


def name_of(directory: Path) -> str:
    """Give the model name or hub id of a directory: the way back from `directory_name`."""
    return directory.name.replace(_HUB_SEPARATOR, "/", 1)


def resolve(name_or_path: str, root: Path) -> Path:
    """Find a model directory by name under the root, or by path.

    Args:
        name_or_path: A name as `list_models` gives it, or the path of a directory in Hugging Face layout.
        root: Where models live.

    Raises:
        ModelError: There is no such directory, or it is no model, or may not be read; the message says what was looked for and
            how to get it.
    """
    looked_for: list[Path] = []
    if _NAME_PATTERN.fullmatch(name_or_path) or is_hub_id(name_or_path):
        looked_for.append(expand_home(root, "model.store") / directory_name(name_or_path))
    looked_for.append(expand_home(name_or_path, "model.name").absolute())
    for directory in looked_for:
        if _is_model(directory):
            return directory
    places = " or ".join(str(directory) for directory in looked_for)
    raise ModelError(f"no model {name_or_path!r}: looked for {places}; get one with `headrace models pull {name_or_path}`")


def list_models(root: Path) -> list[ModelEntry]:
    """List the models under the root, by name; empty when the root is not there yet.

    Raises:
        ModelError: The root may not be read.
    """
    root = expand_home(root, "model.store")
    try:
        names = [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []
    except OSError as error:
        raise ModelError(f"the model store {root} cannot be read ({error.strerror})", param="model.store") from error
    found = [path for path in names if _is_model(path)]
    return [ModelEntry(name=name_of(path), path=path) for path in sorted(found)]


def _is_model(directory: Path) -> bool:
    try:
        return (directory / CONFIG_FILE).is_file()
    except OSError as error:
        raise ModelError(f"the model directory {directory} cannot be read ({error.strerror})", param="model.store") from error
