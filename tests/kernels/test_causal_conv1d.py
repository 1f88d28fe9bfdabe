"""`causal_conv1d` against its reference: outputs, states, and all that must stay as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.causal_conv1d import launch, reference
from kernels.causal_conv1d.reference import Filter
from kernels.launching import KernelArgumentError
from tests.kernels.comparing import FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided

WIDTHS = (2, 3, 4, 5)


def filter_of(dim: int, width: int, dtype: torch.dtype = torch.float32, *, has_bias: bool = True, is_silu: bool = True) -> Filter:
    return Filter(normal(dim, width, dtype=dtype), normal(dim, dtype=dtype) if has_bias else None, is_silu)


def starts_of(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def slots_of(*slots: int) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is compared where not a bit may change, NaN or not."""
    return tensor.contiguous().view(torch.uint8)


def check_prefill(
    lengths: tuple[int, ...],
    slots: torch.Tensor,
    is_initial: list[bool],
    layer: Filter,
    states: torch.Tensor,
    x: torch.Tensor,
    **form: Any,
) -> torch.Tensor:
    """Run kernel and reference, compare outputs and all states; gives the kernel's output."""
    wanted_states, wanted = states.clone(), poisoned(*x.shape, dtype=x.dtype)
    initial = torch.tensor(is_initial, dtype=torch.bool)
    reference.causal_conv1d_prefill(x, layer, wanted_states, starts_of(*lengths), slots, initial, wanted)
    length_max = max(lengths, default=0)
    out = launch.causal_conv1d_prefill(x, layer, states, starts_of(*lengths), slots, initial, length_max=length_max, **form)
    is_written = ~wanted.isnan().any(dim=1)
    assert_matches(out[is_written], wanted[is_written])
    assert torch.equal(bits(out[~is_written]), bits(wanted[~is_written]))
    # A state is inputs as they were: not a bit differs, whether its slot was in the batch or not.
    assert torch.equal(bits(states), bits(wanted_states))
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_sequences_of_all_lengths_are_convolved(width: int, dtype: torch.dtype) -> None:
    """Lengths below, at and above window and tile, one empty, with and without an initial state, a slot of padding between."""
    lengths = (1, width, 40, 0, 7, 2)
    slots, is_initial = slots_of(5, 0, 3, 1, -1, 4), [True, False, True, True, True, False]
    x, states = normal(sum(lengths), 20, dtype=dtype), normal(7, 20, width - 1, dtype=dtype)
    check_prefill(lengths, slots, is_initial, filter_of(20, width, dtype), states, x)


@pytest.mark.parametrize(("has_bias", "is_silu"), [(False, True), (True, False)])
def test_bias_and_activation_may_be_absent(has_bias: bool, is_silu: bool) -> None:
    layer = filter_of(150, 4, has_bias=has_bias, is_silu=is_silu)
    check_prefill((33, 3), slots_of(0, 1), [True, False], layer, normal(2, 150, 3), normal(36, 150))


@pytest.mark.parametrize("state_len", [4, 6, 9])
def test_a_state_may_be_longer_than_the_window(state_len: int) -> None:
    lengths = (2, 1, 12)
    layer, states = filter_of(10, 4), normal(3, 10, state_len)
    check_prefill(lengths, slots_of(2, 0, 1), [True, False, True], layer, states, normal(15, 10))


def test_a_sequence_without_tokens_keeps_its_state_or_starts_from_zeros() -> None:
    states = normal(2, 10, 3)
    before = states.clone()
    check_prefill((0, 0), slots_of(0, 1), [True, False], filter_of(10, 4), states, normal(0, 10))
    assert torch.equal(states[0], before[0])
    assert (states[1] == 0).all()


def test_a_state_that_does_not_count_is_not_read() -> None:
    states = poisoned(1, 10, 3, dtype=torch.float32)
    out = check_prefill((2,), slots_of(0), [False], filter_of(10, 4), states, normal(2, 10))
    assert out.isfinite().all()


def test_prefill_in_pieces_is_prefill_in_one() -> None:
    """Goal: chunked prefill changes nothing, bit for bit. Method: cut one sequence everywhere."""
    x, layer = normal(7, 10, dtype=torch.bfloat16), filter_of(10, 4, torch.bfloat16)
    whole_state = normal(1, 10, 3, dtype=torch.bfloat16)
    state = whole_state.clone()
    whole = check_prefill((7,), slots_of(0), [True], layer, whole_state, x)
    for begin, end in ((0, 1), (1, 3), (3, 7)):
        piece = check_prefill((end - begin,), slots_of(0), [True], layer, state, x[begin:end])
        assert torch.equal(piece, whole[begin:end])
    assert torch.equal(state, whole_state)


def test_strides_and_gaps() -> None:
    """A slice of a fused projection for x, states with channels as neighbours, a strided output whose gaps stay as they were."""
    projection = normal(9, 40)
    states = normal(3, 3, 20).transpose(1, 2)
    out = strided(poisoned(9, 20, dtype=torch.float32))
    check_prefill((4, 5), slots_of(2, 0), [True, True], filter_of(20, 4), states, projection[:, 10:30], out=out)
    assert out.as_strided((8, 3), (23, 1), 20).isnan().all()


# Update


def check_update(x: torch.Tensor, layer: Filter, states: torch.Tensor, slots: torch.Tensor, **form: Any) -> torch.Tensor:
    wanted_states, wanted = states.clone(), poisoned(*x.shape, dtype=x.dtype)
    reference.causal_conv1d_update(x, layer, wanted_states, slots, wanted)
    out = launch.causal_conv1d_update(x, layer, states, slots, **form)
    assert_matches(out[slots >= 0], wanted[slots >= 0])
    assert torch.equal(bits(out[slots < 0]), bits(wanted[slots < 0]))
    assert torch.equal(bits(states), bits(wanted_states))
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_steps", [1, 2, 6])
def test_states_move_on_by_a_few_tokens(num_steps: int, width: int, dtype: torch.dtype) -> None:
    """Sequences in any order of slots, two rows of padding among them; slots of no sequence keep every bit."""
    x, states = normal(4, num_steps, 50, dtype=dtype), normal(6, 50, width - 1, dtype=dtype)
    states[4] = torch.nan
    check_update(x, filter_of(50, width, dtype), states, slots_of(5, -1, 0, -1))


def test_a_row_of_padding_keeps_what_was_in_the_output() -> None:
    x, states, out = normal(3, 1, 20), normal(3, 20, 3), normal(3, 1, 20)
    x[1] = torch.nan
    before = out.clone()
    launch.causal_conv1d_update(x, filter_of(20, 4), states, slots_of(2, -1, 0), out=out)
    assert torch.equal(out[1], before[1])
    assert out.isfinite().all()
    assert states.isfinite().all()


def test_updates_with_longer_states_and_strides() -> None:
    projection, states = normal(3, 2, 64), normal(4, 8, 30).transpose(1, 2)
    out = strided(poisoned(3, 2, 30, dtype=torch.float32), dim=1)
    check_update(projection[:, :, 20:50], filter_of(30, 3), states, slots_of(1, 3, 0), out=out)
    assert out.as_strided((5, 3), (33, 1), 30).isnan().all()


def test_an_update_is_a_prefill_of_its_tokens() -> None:
    layer, x = filter_of(20, 4, torch.bfloat16), normal(3, 2, 20, dtype=torch.bfloat16)
    states = normal(3, 20, 3, dtype=torch.bfloat16)
    others = states.clone()
    updated = check_update(x, layer, states, slots_of(0, 1, 2))
    prefilled = check_prefill((2, 2, 2), slots_of(0, 1, 2), [True] * 3, layer, others, x.flatten(0, 1))
    assert torch.equal(updated.flatten(0, 1), prefilled)
    assert torch.equal(states, others)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    layer, x, states = filter_of(20, 4), normal(5, 1, 20), normal(5, 20, 3)
    alone_states = states.clone()
    together = check_update(x, layer, states, slots_of(0, 1, 2, 3, 4))
    alone = launch.causal_conv1d_update(x[3:4], layer, alone_states, slots_of(3))
    assert torch.equal(alone, together[3:4])
    assert torch.equal(alone_states[3], states[3])


def test_an_empty_batch_changes_nothing() -> None:
    layer, states = filter_of(20, 4), normal(2, 20, 3)
    before = states.clone()
    assert launch.causal_conv1d_update(normal(0, 1, 20), layer, states, slots_of()).shape == (0, 1, 20)
    assert launch.causal_conv1d_update(normal(2, 0, 20), layer, states, slots_of(0, 1)).shape == (2, 0, 20)
    assert check_prefill((), slots_of(), [], layer, states, normal(0, 20)).shape == (0, 20)
    assert torch.equal(states, before)


def test_offsets_reach_past_two_to_the_31() -> None:
    """Goal: no 32-bit product of a stride. Method: slots and tokens lie 2^31 elements on, in memory never touched before."""
    layer = filter_of(8, 4, torch.float16)
    far = lazy_zeros(5, 2**29 + 1, dtype=torch.float16)
    states, x, out = far[:, :24].unflatten(1, (8, 3)), far[:, 24:32], far[:, 32:40]
    x.copy_(normal(5, 8))
    states.copy_(normal(5, 8, 3))
    near_x, near_states = x.clone(), states.clone()
    check_prefill((2, 3), slots_of(4, 0), [True, True], layer, near_states, near_x)
    wanted = launch.causal_conv1d_prefill(
        near_x, layer, states.clone(), starts_of(2, 3), slots_of(4, 0), torch.ones(2, dtype=torch.bool), length_max=3
    )
    launch.causal_conv1d_prefill(
        x, layer, states, starts_of(2, 3), slots_of(4, 0), torch.ones(2, dtype=torch.bool), length_max=3, out=out
    )
    assert torch.equal(out, wanted)
    assert torch.equal(states, near_states)
    wanted = check_update(near_x[:, None], layer, near_states, slots_of(4, 2, 3, 1, 0))
    launch.causal_conv1d_update(x[:, None], layer, states, slots_of(4, 2, 3, 1, 0), out=out[:, None])
    assert torch.equal(out[:, None], wanted)
    assert torch.equal(states, near_states)


# Refusals


def test_wrong_arguments_are_named() -> None:
    x, states, layer = normal(2, 1, 8), normal(2, 8, 3), filter_of(8, 4)
    good: dict[str, Any] = {"x": x, "layer": layer, "states": states, "slots": slots_of(0, 1)}
    for name, value, message in (
        ("x", x.int(), r"x must have or be torch.float32 or .*, got torch.int32"),
        ("x", normal(2, 65, 8), "x must have or be up to 64 steps, got 65"),
        ("layer", filter_of(8, 6), "weight must have or be a width of 2 to 5, got 6"),
        ("layer", filter_of(7, 4), r"weight must have or be shape \(8, any\), got shape \(7, 4\)"),
        ("layer", Filter(layer.weight, normal(7)), r"bias must have or be shape \(8\), got shape \(7,\)"),
        ("layer", Filter(normal(4, 8).T), "weight must have or be a contiguous tensor"),
        ("states", states[:, :, :2], "states must have or be 3 to 64 inputs, got 2"),
        ("states", states[:, :7], r"states must have or be shape \(any, 8, any\), got shape \(2, 7, 3\)"),
        ("slots", slots_of(0), r"slots must have or be shape \(2\), got shape \(1,\)"),
        ("slots", slots_of(0, 1).long(), "slots must have or be torch.int32, got torch.int64"),
        ("slots", slots_of(0, 1).to("meta"), f"slots must have or be device {x.device}, got device meta"),
        ("out", x, "out must have or be another tensor than x, got x"),
        ("out", x.half(), "out must have or be torch.float32, got torch.float16"),
    ):
        with pytest.raises(KernelArgumentError, match=f"causal_conv1d_update: {message}"):
            launch.causal_conv1d_update(**(good | {name: value}))
    good = {"x": x[:, 0], "layer": layer, "states": states, "starts": starts_of(1, 1), "slots": slots_of(0, 1)}
    good |= {"has_initial_state": torch.ones(2, dtype=torch.bool), "length_max": 1}
    for name, value, message in (
        ("starts", starts_of(1), r"starts must have or be shape \(3\), got shape \(2,\)"),
        ("has_initial_state", torch.ones(2), "has_initial_state must have or be torch.bool, got torch.float32"),
        ("length_max", -1, "length_max must have or be 0 or more, got -1"),
        ("slots", torch.zeros(65536, dtype=torch.int32), "slots must have or be up to 65535 sequences, got 65536"),
        ("x", normal(8, 2).T, "x must have or be stride 1 in the last dimension"),
    ):
        with pytest.raises(KernelArgumentError, match=f"causal_conv1d_prefill: {message}"):
            launch.causal_conv1d_prefill(**(good | {name: value}))
