"""Every message ever released still parses, and still means what it meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from headrace.v1 import (
    common_pb2,
    control_pb2,
    detokenizer_pb2,
    inference_pb2,
    router_pb2,
    scheduler_pb2,
    tokenizer_pb2,
    worker_pb2,
)

GOLDEN = Path(__file__).parent / "golden"
PROTOS = {
    "common": common_pb2,
    "control": control_pb2,
    "detokenizer": detokenizer_pb2,
    "inference": inference_pb2,
    "router": router_pb2,
    "scheduler": scheduler_pb2,
    "tokenizer": tokenizer_pb2,
    "worker": worker_pb2,
}
EXAMPLES = [
    pytest.param(proto, message, example, id=f"{message}-{index}")
    for proto in PROTOS
    for message, examples in json.loads((GOLDEN / f"{proto}.json").read_text()).items()
    for index, example in enumerate(examples)
]
DESCRIPTORS = [
    pytest.param(proto, descriptor, id=name)
    for proto, module in PROTOS.items()
    for name, descriptor in module.DESCRIPTOR.message_types_by_name.items()
]


@pytest.mark.parametrize(("proto", "message", "example"), EXAMPLES)
def test_old_bytes_keep_their_meaning(proto: str, message: str, example: dict[str, Any]) -> None:
    descriptor = PROTOS[proto].DESCRIPTOR.message_types_by_name.get(message)
    assert descriptor is not None, f"{message} was released and is gone: removed messages break their speakers"
    parsed = GetMessageClass(descriptor).FromString(bytes.fromhex(example["bytes"]))
    assert MessageToDict(parsed, preserving_proto_field_name=True) == example["value"]
    assert parsed.SerializeToString(deterministic=True).hex() == example["bytes"]


@pytest.mark.parametrize(("proto", "descriptor"), DESCRIPTORS)
def test_every_field_has_golden_bytes(proto: str, descriptor: Descriptor) -> None:
    examples = json.loads((GOLDEN / f"{proto}.json").read_text()).get(descriptor.name)
    assert examples, f"{descriptor.name} has no golden bytes: run python tools/golden.py"
    missing = {field.name for field in descriptor.fields} - {name for example in examples for name in example["value"]}
    assert not missing, f"fields of {descriptor.name} without golden bytes: run python tools/golden.py"


def test_every_proto_file_is_under_this_test() -> None:
    sources = Path(__file__).parents[2].joinpath("proto", "headrace", "v1").glob("*.proto")
    assert {path.stem for path in sources} == set(PROTOS)


@pytest.mark.parametrize(("proto", "descriptor"), DESCRIPTORS)
def test_enums_start_with_unspecified_and_integer_arrays_are_packed(proto: str, descriptor: Descriptor) -> None:
    for enum in PROTOS[proto].DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
    unpackable = (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    for field in descriptor.fields:
        if field.is_repeated and field.type not in unpackable:
            assert field.is_packed, f"{descriptor.name}.{field.name}"
