"""`lora` against its reference: projections down and up by segments, and the tokens that must stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.lora import launch, reference
from kernels.lora.launch import Parts
from kernels.lora.reference import Segments
from tests.kernels.comparing import BOUNDS, FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def segments_of(lengths: tuple[int, ...], adapters: tuple[int, ...], *, is_shuffled: bool = False) -> Segments:
    starts = integers(0, *lengths).cumsum(0).int()
    return Segments(starts, integers(*adapters), torch.randperm(sum(lengths)).int() if is_shuffled else None)


def matrices(
    num_adapters: int, rank_max: int, num_inputs: int, widths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    a = normal(num_adapters, len(widths), rank_max, num_inputs, dtype=dtype, scale=num_inputs**-0.5)
    return a, [normal(num_adapters, width, rank_max, dtype=dtype) for width in widths]


def poison_beyond(a: torch.Tensor, b: list[torch.Tensor], ranks: torch.Tensor) -> None:
    """What lies past an adapter's rank must not be read."""
    for adapter, rank in enumerate(ranks.tolist()):
        a[adapter, :, rank:] = torch.nan
        for each in b:
            each[adapter, :, rank:] = torch.nan


def check(
    x: torch.Tensor,
    a: torch.Tensor,
    b: list[torch.Tensor],
    ranks: torch.Tensor,
    segments: Segments,
    out: torch.Tensor,
    **form: Any,
) -> None:
    """Run both kernels against the reference; tokens without an adapter keep every bit of the output."""
    scalings, before = torch.rand(len(ranks)) + 0.5, out.clone()
    length_max = int(segments.starts.diff().max()) if len(segments.adapters) else 0
    parts = launch.lora_shrink(x, a, ranks, segments, length_max=length_max, **form)
    wanted_h, wanted = reference.lora_shrink(x, a, ranks, segments), before.clone()
    reference.lora_expand(wanted_h, b, ranks, scalings, segments, wanted)
    adapted = torch.zeros(len(x), dtype=torch.bool)
    for tokens, _ in segments.tokens():
        adapted[tokens] = True
    assert_matches(parts.total()[adapted], wanted_h[adapted])
    assert parts.parts[:, ~adapted].isnan().all()
    launch.lora_expand(parts, b, ranks, scalings, segments, out, length_max=length_max)
    # The parts are rounded for the second product: one rounding more than a result has.
    assert_matches(out[adapted], wanted[adapted], bound=2 * BOUNDS[out.dtype])
    assert torch.equal(out[~adapted].view(torch.uint8), before[~adapted].view(torch.uint8))


@pytest.mark.parametrize("is_shuffled", [False, True], ids=["in-place", "in-order"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "adapters", "num_inputs", "widths"),
    [
        ((1, 1, 1, 1), (2, -1, 0, 2), 40, (24,)),
        ((17, 3, 0, 33), (1, -1, 0, 2), 150, (70, 20)),
        ((5,), (0,), 17, (8, 8, 200)),
        ((4, 4), (-1, -1), 20, (8,)),
    ],
    ids=["decode", "prefill", "three-slices", "no-adapter"],
)
def test_tokens_get_their_adapters_addition(
    lengths: tuple[int, ...],
    adapters: tuple[int, ...],
    num_inputs: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    is_shuffled: bool,
) -> None:
    ranks = integers(5, 20, 0)
    a, b = matrices(3, 20, num_inputs, widths, dtype)
    poison_beyond(a, b, ranks)
    x, out = normal(sum(lengths), num_inputs, dtype=dtype), normal(sum(lengths), sum(widths), dtype=dtype)
    check(x, a, b, ranks, segments_of(lengths, adapters, is_shuffled=is_shuffled), out)


@pytest.mark.parametrize("rank", [1, 16, 64, 100, 130])
def test_ranks_of_all_sizes(rank: int) -> None:
    a, b = matrices(2, 130, 30, (40,))
    poison_beyond(a, b, integers(rank, rank))
    check(normal(4, 30), a, b, integers(rank, rank), segments_of((1, 3), (1, 0)), normal(4, 40))


@pytest.mark.parametrize("num_splits", [1, 2, 3, 8])
def test_a_split_sum_is_the_sum(num_splits: int) -> None:
    """Also where some splits have no share: 300 inputs are three steps."""
    a, b = matrices(2, 16, 300, (40,))
    check(normal(3, 300), a, b, integers(16, 9), segments_of((2, 1), (0, 1)), normal(3, 40), num_splits=num_splits)


def test_long_inputs_are_split_by_default() -> None:
    assert [launch.num_splits_of(size) for size in (16, 1024, 2048, 4096, 16384)] == [1, 1, 2, 4, 8]
    a, b = matrices(1, 8, 2100, (8,))
    check(normal(2, 2100), a, b, integers(8), segments_of((2,), (0,)), normal(2, 8))


def test_an_order_may_leave_tokens_out() -> None:
    a, b = matrices(2, 8, 20, (24,))
    segments = Segments(integers(0, 2, 3), integers(1, 0), integers(6, 1, 4))
    check(normal(8, 20), a, b, integers(8, 8), segments, normal(8, 24))


def test_strides_and_gaps() -> None:
    a, b = matrices(2, 8, 20, (24, 10))
    out, far_b = strided(normal(5, 34)), [strided(each, dim=1) for each in b]
    check(strided(normal(5, 20)), strided(a, dim=2), far_b, integers(8, 3), segments_of((3, 2), (1, 0)), out)
    assert out.as_strided((4, 3), (37, 1), 34).isnan().all()


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    a, b = matrices(2, 16, 2100, (40,), torch.bfloat16)
    x, out = normal(20, 2100, dtype=torch.bfloat16), normal(20, 40, dtype=torch.bfloat16)
    ranks, scalings, alone = integers(16, 16), torch.ones(2), out[17:18].clone()
    one, many = segments_of((1,), (1,)), segments_of((3, 17), (0, 1))
    launch.lora_expand(launch.lora_shrink(x, a, ranks, many, length_max=17), b, ranks, scalings, many, out, length_max=17)
    parts = launch.lora_shrink(x[17:18], a, ranks, one, length_max=1)
    launch.lora_expand(parts, b, ranks, scalings, one, alone, length_max=1)
    assert torch.equal(alone, out[17:18])


def test_an_empty_batch_changes_nothing() -> None:
    a, b = matrices(2, 8, 20, (24,))
    check(normal(0, 20), a, b, integers(8, 8), segments_of((), ()), normal(0, 24))
    check(normal(3, 20), a, b, integers(8, 8), segments_of((), ()), normal(3, 24))
    check(normal(0, 20), a, b, integers(8, 8), segments_of((0,), (1,)), normal(0, 24))


def test_offsets_reach_past_two_to_the_31() -> None:
    """Goal: no 32-bit product of a stride. Method: adapters and tokens lie 2^31 elements on, in memory never touched before."""
    a, b = matrices(3, 8, 16, (16,), torch.float16)
    far = lazy_zeros(3, 2**30 + 1, dtype=torch.float16)
    far_a, far_b = far[:, :128].unflatten(1, (1, 8, 16)), far[:, 128:256].unflatten(1, (16, 8))
    x, out = far[:, 256:272], far[:, 272:288]
    for place, values in ((far_a, a), (far_b, b[0]), (x, normal(3, 16)), (out, normal(3, 16))):
        place.copy_(values)
    check(x, far_a, [far_b], integers(8, 8, 8), segments_of((1, 2), (0, 2)), out)


# Refusals


def test_wrong_arguments_are_named() -> None:
    a, b = matrices(2, 8, 16, (24, 8))
    x, segments, ranks = normal(3, 16), segments_of((2, 1), (0, 1)), integers(8, 8)
    good: dict[str, Any] = {"x": x, "a": a, "ranks": ranks, "segments": segments, "length_max": 2}
    for name, value, message in (
        ("x", x.int(), r"x must have or be torch.float32 or .*, got torch.int32"),
        ("a", a.half(), "a must have or be torch.float32, got torch.float16"),
        ("a", a[..., :15], r"a must have or be shape \(any, any, any, 16\), got shape \(2, 2, 8, 15\)"),
        ("a", normal(2, 1, 513, 16), "a must have or be ranks of 1 to 512, got 513"),
        ("ranks", integers(8), r"ranks must have or be shape \(2\), got shape \(1,\)"),
        ("segments", Segments(integers(0, 3), integers(0, 1)), r"starts must have or be shape \(3\), got shape \(2,\)"),
        ("segments", Segments(segments.starts, segments.adapters.long()), "adapters must have or be torch.int32, got torch.int64"),
        (
            "segments",
            Segments(segments.starts, segments.adapters, integers(*range(4))),
            "order must have or be up to 3 places, got 4",
        ),
        ("length_max", 4, "length_max must have or be 0 to 3, got 4"),
    ):
        with pytest.raises(KernelArgumentError, match=f"lora_shrink: {message}"):
            launch.lora_shrink(**(good | {name: value}))
    parts = Parts(poisoned(1, 3, 2, 8, dtype=torch.float32))
    good = {
        "h": parts,
        "b": b,
        "ranks": ranks,
        "scalings": torch.ones(2),
        "segments": segments,
        "out": normal(3, 32),
        "length_max": 2,
    }
    for name, value, message in (
        ("b", b[:1], "b must have or be 2 slices, got 1"),
        ("b", [b[0], b[1].half()], r"b\[1\] must have or be torch.float32, got torch.float16"),
        ("b", [b[0], b[1][:, :, :7]], r"b\[1\] must have or be shape \(2, any, 8\), got shape \(2, 8, 7\)"),
        ("scalings", torch.ones(3), r"scalings must have or be shape \(2\), got shape \(3,\)"),
        ("out", normal(3, 31), r"out must have or be shape \(3, 32\), got shape \(3, 31\)"),
        ("h", Parts(parts.parts.to("meta")), f"h must have or be device {x.device}, got device meta"),
    ):
        with pytest.raises(KernelArgumentError, match=f"lora_expand: {message}"):
            launch.lora_expand(**(good | {name: value}))
