"""Adds golden bytes for messages and fields that have none yet: `python tools/golden.py`.

tests/contract/golden/<file>.json holds, for each message of the proto file, examples as bytes (hex) and as what they mean. Examples
are only ever added: once released, those bytes must parse to that meaning for ever (tests/contract/test_golden.py).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "contract" / "golden"
DEPTH_MAX = 4

Examples = dict[str, list[dict[str, Any]]]


def proto_names() -> list[str]:
    """Return the proto files' names without suffix, sorted."""
    return sorted(path.stem for path in (ROOT / "proto" / "headrace" / "v1").glob("*.proto"))


def messages_of(proto: str) -> dict[str, Descriptor]:
    """Return the messages that one proto file defines, by name."""
    return dict(importlib.import_module(f"headrace.v1.{proto}_pb2").DESCRIPTOR.message_types_by_name)


def scalar(field: Any, seed: int) -> Any:
    """Return a value of a field descriptor's type that is not its default and differs from field to field."""
    value = field.number * 7 + seed + 1
    if field.enum_type is not None:
        return field.enum_type.values[1 + seed % (len(field.enum_type.values) - 1)].number
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name} {value}: ü€𝄞"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([value % 256, 0, 255])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return value + 0.5
    is_wide = field.type in (FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_UINT64)
    return (1 << 63) + value if is_wide else value * 1000


def fill(message: Message, arm: int, depth: int = 0) -> None:
    """Set every field of a message; of each oneof the member number `arm`, counted round."""
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.fields[arm % len(oneof.fields)] is not field:
            continue
        if field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend([scalar(field, 0), scalar(field, 1)])
            else:
                setattr(message, field.name, scalar(field, 0))
        elif depth < DEPTH_MAX:
            part = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
            part.SetInParent()
            fill(part, 0, depth + 1)


def uncovered(descriptor: Descriptor, examples: list[dict[str, Any]]) -> set[str]:
    """Return the fields of a message that no example sets."""
    return {field.name for field in descriptor.fields} - {name for example in examples for name in example["value"]}


def add_examples(descriptor: Descriptor, examples: list[dict[str, Any]]) -> int:
    """Append examples until every field stands in one; return how many were appended."""
    before = len(examples)
    if not descriptor.fields and not examples:
        examples.append({"bytes": "", "value": {}})
    arms = max([len(oneof.fields) for oneof in descriptor.oneofs], default=1)
    for arm in range(arms):
        message = GetMessageClass(descriptor)()
        fill(message, arm)
        value = MessageToDict(message, preserving_proto_field_name=True)
        if uncovered(descriptor, examples) & set(value):
            examples.append({"bytes": message.SerializeToString(deterministic=True).hex(), "value": value})
    return len(examples) - before


def main() -> int:
    """Complete the golden file of every proto."""
    GOLDEN.mkdir(exist_ok=True)
    for proto in proto_names():
        path = GOLDEN / f"{proto}.json"
        golden: Examples = json.loads(path.read_text()) if path.exists() else {}
        num_added = sum(add_examples(descriptor, golden.setdefault(name, [])) for name, descriptor in messages_of(proto).items())
        path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
        print(f"{path.relative_to(ROOT)}: {num_added} examples added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
