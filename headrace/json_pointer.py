"""What a reference inside a JSON document leads to. Pure.

Source: RFC 6901, JSON Pointer, as fragments that begin with `#`.
"""

from __future__ import annotations

from collections.abc import Mapping


def steps_of(pointer: str) -> list[str]:
    """The names and numbers that a pointer goes through."""
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]


def referred(root: object, pointer: object) -> object:
    """What a pointer leads to from the root; None where that is nothing, or it is no pointer."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        return None
    target = root
    for name in steps_of(pointer):
        if isinstance(target, Mapping):
            target = target.get(name)
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            return None
    return target
