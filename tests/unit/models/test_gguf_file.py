"""The GGUF container: every type against a scalar reference written from the format's description, and files that lie."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import ModelError
from headrace.models.gguf_file import SUPPORTED_TYPES, TYPES, GgufFile


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def block_q4_0(b: bytes) -> list[float]:
    d, q = half(b[:2]), b[2:]
    return [((x & 15) - 8) * d for x in q] + [((x >> 4) - 8) * d for x in q]


def block_q4_1(b: bytes) -> list[float]:
    d, m, q = half(b[:2]), half(b[2:4]), b[4:]
    return [(x & 15) * d + m for x in q] + [(x >> 4) * d + m for x in q]


def five_bits(high: bytes, low: bytes) -> list[int]:
    bits = int.from_bytes(high, "little")
    nibbles = [x & 15 for x in low] + [x >> 4 for x in low]
    return [nibble | ((bits >> index) & 1) << 4 for index, nibble in enumerate(nibbles)]


def block_q5_0(b: bytes) -> list[float]:
    return [(q - 16) * half(b[:2]) for q in five_bits(b[2:6], b[6:])]


def block_q5_1(b: bytes) -> list[float]:
    return [q * half(b[:2]) + half(b[2:4]) for q in five_bits(b[4:8], b[8:])]


def block_q8_0(b: bytes) -> list[float]:
    return [q * half(b[:2]) for q in struct.unpack("32b", b[2:])]


def scale_and_min(scales: bytes, index: int) -> tuple[int, int]:
    if index < 4:
        return scales[index] & 63, scales[index + 4] & 63
    low = scales[index + 4]
    return (low & 15) | (scales[index - 4] >> 6) << 4, (low >> 4) | (scales[index] >> 6) << 4


def block_q4_k(b: bytes) -> list[float]:
    d, dmin, scales, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    values = []
    for group in range(8):
        scale, minimum = scale_and_min(scales, group)
        for x in q[group // 2 * 32 : group // 2 * 32 + 32]:
            values.append(d * scale * ((x >> 4) if group % 2 else (x & 15)) - dmin * minimum)
    return values


def block_q5_k(b: bytes) -> list[float]:
    d, dmin, scales, high, q = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:]
    values = []
    for group in range(8):
        scale, minimum = scale_and_min(scales, group)
        for index, x in enumerate(q[group // 2 * 32 : group // 2 * 32 + 32]):
            value = ((x >> 4) if group % 2 else (x & 15)) + 16 * ((high[index] >> group) & 1)
            values.append(d * scale * value - dmin * minimum)
    return values


def block_q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:])
    values = [0.0] * 256
    for half_index in range(2):
        for part in range(4):
            for index in range(32):
                byte = low[half_index * 64 + (part % 2) * 32 + index]
                nibble = byte >> 4 if part >= 2 else byte & 15
                top = (high[half_index * 32 + index] >> (2 * part)) & 3
                scale = scales[half_index * 8 + part * 2 + index // 16]
                values[half_index * 128 + part * 32 + index] = d * scale * ((nibble | top << 4) - 32)
    return values


def block_q2_k(b: bytes) -> list[float]:
    scales, q, d, dmin = b[:16], b[16:80], half(b[80:82]), half(b[82:84])
    values = []
    for group in range(16):
        half_index, part, side = group // 8, group // 2 % 4, group % 2
        for x in q[half_index * 32 + side * 16 : half_index * 32 + side * 16 + 16]:
            values.append(d * (scales[group] & 15) * ((x >> 2 * part) & 3) - dmin * (scales[group] >> 4))
    return values


def block_q3_k(b: bytes) -> list[float]:
    high, q, scales, d = b[:32], b[32:96], b[96:108], half(b[108:110])
    values = []
    for group in range(16):
        half_index, part, side = group // 8, group // 2 % 4, group % 2
        low = scales[group] & 15 if group < 8 else scales[group - 8] >> 4
        scale = (low | (scales[8 + group % 4] >> 2 * (group // 4) & 3) << 4) - 32
        for index in range(side * 16, side * 16 + 16):
            value = (q[half_index * 32 + index] >> 2 * part) & 3
            values.append(d * scale * (value - (0 if high[index] >> (half_index * 4 + part) & 1 else 4)))
    return values


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def block_iq4_nl(b: bytes) -> list[float]:
    return [half(b[:2]) * IQ4[x & 15] for x in b[2:]] + [half(b[:2]) * IQ4[x >> 4] for x in b[2:]]


def block_iq4_xs(b: bytes) -> list[float]:
    d, high, low, q = half(b[:2]), int.from_bytes(b[2:4], "little"), b[4:8], b[8:]
    values = []
    for group in range(8):
        scale = ((low[group // 2] >> 4 * (group % 2)) & 15 | ((high >> 2 * group) & 3) << 4) - 32
        part = q[group * 16 : group * 16 + 16]
        values += [d * scale * IQ4[x & 15] for x in part] + [d * scale * IQ4[x >> 4] for x in part]
    return values


# Type → values and bytes of a block, places of its float16 fields, scalar reference.
BLOCKS: dict[str, tuple[int, int, tuple[int, ...], Callable[[bytes], list[float]]]] = {
    "Q4_0": (32, 18, (0,), block_q4_0),
    "Q4_1": (32, 20, (0, 2), block_q4_1),
    "Q5_0": (32, 22, (0,), block_q5_0),
    "Q5_1": (32, 24, (0, 2), block_q5_1),
    "Q8_0": (32, 34, (0,), block_q8_0),
    "Q2_K": (256, 84, (80, 82), block_q2_k),
    "Q3_K": (256, 110, (108,), block_q3_k),
    "Q4_K": (256, 144, (0, 2), block_q4_k),
    "Q5_K": (256, 176, (0, 2), block_q5_k),
    "Q6_K": (256, 210, (208,), block_q6_k),
    "IQ4_NL": (32, 18, (0,), block_iq4_nl),
    "IQ4_XS": (256, 136, (0,), block_iq4_xs),
}


def random_block(rng: random.Random, num_bytes: int, halves: tuple[int, ...]) -> bytes:
    block = bytearray(rng.randbytes(num_bytes))
    for place in halves:
        block[place : place + 2] = struct.pack("<e", rng.uniform(-2, 2))
    return bytes(block)


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantised_type_equals_the_scalar_reference(kind, gguf_builder, tmp_path):
    num_values, num_bytes, halves, reference = BLOCKS[kind]
    rng = random.Random(kind)
    blocks = [random_block(rng, num_bytes, halves) for _ in range(6)]
    gguf_builder.add("t", (3, 2 * num_values), kind, b"".join(blocks))
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    values = file.unpack("t", file.packed("t"))

    expected = np.array([value for block in blocks for value in reference(block)]).reshape(3, 2 * num_values)
    assert values.dtype == np.float32
    assert values.flags.writeable
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_every_supported_type_is_covered_here():
    assert {*BLOCKS, "F32", "F16", "BF16"} == set(SUPPORTED_TYPES)


@pytest.mark.parametrize("number", TYPES)
def test_type_is_the_one_that_the_gguf_library_knows(number):
    known = GGMLQuantizationType(number)
    assert TYPES[number] == (known.name, *GGML_QUANT_SIZES[known])


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "<f4"), ("F16", "<f2"), ("BF16", "<u2")])
def test_plain_type_comes_back_bit_for_bit(kind, dtype, gguf_builder, tmp_path):
    data = np.arange(12, dtype="<u2").repeat(2 if kind == "F32" else 1).tobytes()
    gguf_builder.add("t", (3, 4), kind, data)
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    values = file.unpack("t", file.packed("t"))

    assert values.dtype == np.dtype(dtype)
    assert values.shape == (3, 4)
    assert values.tobytes() == data


def test_metadata_of_every_kind_is_read(gguf_builder, tmp_path, raw_value):
    gguf_builder.metadata = {
        "flag": True,
        "number": 7,
        "real": 0.5,
        "word": "höhe",
        "words": ["a", ""],
        "numbers": [1, 2],
        "nested": raw_value(struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 4, 2) + struct.pack("<II", 5, 6)),
        "long": raw_value(struct.pack("<Iq", 11, -(1 << 40))),
    }
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    assert dict(file.metadata) == {
        "flag": True,
        "number": 7,
        "real": 0.5,
        "word": "höhe",
        "words": ["a", ""],
        "numbers": [1, 2],
        "nested": [[5, 6]],
        "long": -(1 << 40),
    }


def test_broken_text_in_a_list_is_refused_when_it_is_asked_for(gguf_builder, tmp_path, raw_value):
    """Lists of strings are stepped over at first: who loads weights does not pay for a vocabulary."""
    gguf_builder.metadata = {
        "words": raw_value(struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 1) + b"\xff"),
        "after": 7,
    }
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    assert file.metadata["after"] == 7
    with pytest.raises(ModelError, match="UTF-8"):
        file.metadata["words"]


def test_alignment_of_the_file_is_used(gguf_builder, tmp_path):
    gguf_builder.metadata = {"general.alignment": 64}
    gguf_builder.alignment = 64
    gguf_builder.add_f32("a", np.array([1.0]))
    gguf_builder.add_f32("b", np.array([2.0]))
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    assert file.tensors["b"].offset % 64 == 0
    assert file.unpack("b", file.packed("b")).tolist() == [2.0]


def test_unsupported_types_are_all_named(gguf_builder, tmp_path):
    gguf_builder.add("a", (1, 256), "IQ2_XXS", bytes(66))
    gguf_builder.add("b", (1, 256), 9999, bytes(32))
    file = GgufFile(gguf_builder.write(tmp_path / "a.gguf"))

    with pytest.raises(ModelError, match=r"not supported: IQ2_XXS, type 9999; .*Q4_K"):
        file.check_types(["a", "b"])
    with pytest.raises(ModelError, match="IQ2_XXS"):
        file.packed("a")


HUGE = (1 << 64) - 1


def set_field(name, value):
    return lambda builder: setattr(builder, name, value)


def add_tensor(*args, **kwargs):
    return lambda builder: builder.add(*args, **kwargs)


def add_metadata(raw: bytes):
    def change(builder):
        builder.metadata["x"] = raw

    return change


def add_twice(builder):
    builder.add("a", (8,), "F32", bytes(32))
    builder.add("a", (8,), "F32", bytes(32))


def add_overlapping(builder):
    builder.add("a", (16,), "F32", bytes(64))
    builder.add("b", (16,), "F32", bytes(64), offset=32)


LIES = {
    "tensor count": (set_field("num_tensors", HUGE), "claims .* tensors"),
    "metadata count": (set_field("num_entries", HUGE), "claims .* metadata entries"),
    "version": (set_field("version", 1), "version 1"),
    "shape beyond the file": (add_tensor("t", (1 << 40, 1 << 20), "F32", b""), "needs .* bytes"),
    "shape beyond 64 bits": (add_tensor("t", (1 << 63, 1 << 63), "F32", b""), "needs .* bytes"),
    "offset beyond the file": (add_tensor("t", (8,), "F32", bytes(32), offset=1 << 60), "needs .* bytes"),
    "crooked offset": (add_tensor("t", (8,), "F32", bytes(64), offset=3), "alignment"),
    "no dimensions": (add_tensor("t", (), "F32", b""), "0 dimensions"),
    "many dimensions": (add_tensor("t", (1,) * 9, "F32", bytes(4)), "9 dimensions"),
    "empty dimension": (add_tensor("t", (0, 4), "F32", b""), "empty dimension"),
    "part of a block": (add_tensor("t", (2, 16), "Q4_0", bytes(18)), "packs 32"),
    "same name": (add_twice, "twice"),
    "overlap": (add_overlapping, "inside another"),
    "long array": (add_metadata(struct.pack("<IIQ", 9, 4, HUGE)), "claims .* array items"),
    "long array of strings": (add_metadata(struct.pack("<IIQ", 9, 8, 1 << 40)), "claims .* array items"),
    "list of strings beyond the file": (
        add_metadata(struct.pack("<IIQ", 9, 8, 2) + struct.pack("<QQ", 0, 1 << 62)),
        "inside a list of 2 strings",
    ),
    "long string": (add_metadata(struct.pack("<IQ", 8, HUGE)), "ends at byte"),
    "deep array": (add_metadata(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + bytes(99)), "deep"),
    "unknown value type": (add_metadata(struct.pack("<I", 77)), "unknown type 77"),
    "alignment of zero": (lambda builder: builder.metadata.update({"general.alignment": 0}), "alignment"),
    "text for alignment": (lambda builder: builder.metadata.update({"general.alignment": "x"}), "alignment"),
    "broken text": (add_metadata(struct.pack("<IQ", 8, 1) + b"\xff"), "UTF-8"),
}


@pytest.mark.parametrize("lie", LIES)
def test_file_that_lies_is_refused(lie, gguf_builder, tmp_path, raw_value):
    change, message = LIES[lie]
    change(gguf_builder)
    if isinstance(gguf_builder.metadata.get("x"), bytes):
        gguf_builder.metadata["x"] = raw_value(gguf_builder.metadata["x"])
    path = gguf_builder.write(tmp_path / "a.gguf")

    with pytest.raises(ModelError, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_cut_anywhere_is_refused(llama_builder, tmp_path):
    # A cut in the header or in the tensors; only the padding after the last tensor may be missing.
    whole = llama_builder.write(tmp_path / "whole.gguf").read_bytes()
    head, _ = llama_builder.header()
    cut = tmp_path / "cut.gguf"
    for length in [*range(200), *range(200, len(head), 97), len(head), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            GgufFile(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), num_changes=st.integers(1, 8))
def test_changed_header_never_fails_otherwise(seed, num_changes, llama_builder, tmp_path):
    head, data = llama_builder.header()
    changed = bytearray(head)
    rng = random.Random(seed)
    for _ in range(num_changes):
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(changed) + data)

    try:
        file = GgufFile(path)
    except ModelError:
        return
    size = path.stat().st_size
    assert all(tensor.offset + tensor.num_bytes <= size for tensor in file.tensors.values() if tensor.num_bytes)


def test_other_files_are_refused(tmp_path):
    for name, content in {"empty": b"", "text": b"hello there, this is text", "missing": None}.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match="GGUF"):
            GgufFile(path)
