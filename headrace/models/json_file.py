"""Bounded reading of a model directory's JSON files; one line for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from headrace.errors import ModelError
from headrace.models.config_fields import PULL_AGAIN

_BYTES_MAX: Final = 64 * 1024 * 1024


def read_json(path: Path) -> Any:
    """Read a file.

    Raises:
        ModelError: It is missing, too large or damaged.
    """
    try:
        if path.stat().st_size > _BYTES_MAX:
            raise ModelError(f"{path}: larger than {_BYTES_MAX} bytes; {PULL_AGAIN}")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; get the model with `headrace models pull <name>`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; {PULL_AGAIN}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one object.

    Raises:
        ModelError: As for `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ModelError(f"{path}: is not a JSON object; {PULL_AGAIN}")
    return value
