"""Paths of settings that begin with `~`."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ConfigError


def expand_home(path: str | Path, setting: str) -> Path:
    """The path with its `~` filled in.

    Args:
        path: As it was set.
        setting: Its name, for the error.

    Raises:
        ConfigError: Nobody knows that home directory: HOME is not set, and the user has no entry among the machine's.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{setting} {str(path)!r}: its home directory is not known: set HOME, or give the whole path", param=setting
        ) from error
