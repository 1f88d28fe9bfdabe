"""`selective_state_update` against its reference: outputs, states, the states between, and all that must stay as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kernels.launching import KernelArgumentError
from kernels.selective_state_update import launch, reference
from kernels.selective_state_update.reference import Intermediate, Recurrence, Steps
from tests.kernels.comparing import FLOATS, assert_matches, lazy_zeros, normal, poisoned, strided

NUM_HEADS, HEAD_DIM = 4, 10


def slots_of(*slots: int) -> torch.Tensor:
    return torch.tensor(slots, dtype=torch.int32)


def layer_of(state_size: int, *, is_per_head: bool = False, **form: Any) -> Recurrence:
    """A recurrence with all its parts; per head, as in Mamba 2, by stride 0."""
    if is_per_head:
        a = -torch.rand(NUM_HEADS)[:, None, None].expand(-1, HEAD_DIM, state_size)
        d, dt_bias = (normal(NUM_HEADS)[:, None].expand(-1, HEAD_DIM) for _ in range(2))
    else:
        a, d, dt_bias = -torch.rand(NUM_HEADS, HEAD_DIM, state_size), normal(NUM_HEADS, HEAD_DIM), normal(NUM_HEADS, HEAD_DIM)
    return dataclasses.replace(Recurrence(a, d, dt_bias, is_softplus=True), **form)


def steps_of(
    num_sequences: int,
    num_steps: int,
    state_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_groups: int = 2,
    has_z: bool = True,
) -> Steps:
    x, dt, z = (normal(num_sequences, num_steps, NUM_HEADS, HEAD_DIM, dtype=dtype) for _ in range(3))
    b, c = (normal(num_sequences, num_steps, num_groups, state_size, dtype=dtype) for _ in range(2))
    return Steps(x, dt, b, c, z if has_z else None)


def states_of(num_slots: int, state_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(num_slots, NUM_HEADS, HEAD_DIM, state_size, dtype=dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check(
    layer: Recurrence,
    steps: Steps,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    intermediate: Intermediate | None = None,
    is_state_kept: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run kernel and reference; compare outputs, all states and all states between, and what must not change bit for bit."""
    before, wanted_states, wanted = states.clone(), states.clone(), poisoned(*steps.x.shape, dtype=steps.x.dtype)
    wanted_between = None if intermediate is None else Intermediate(intermediate.states.clone(), intermediate.indices)
    form: dict[str, Any] = {"is_state_kept": is_state_kept}
    reference.selective_state_update(layer, steps, wanted_states, slots, wanted, intermediate=wanted_between, **form)
    out = launch.selective_state_update(layer, steps, states, slots, intermediate=intermediate, out=out, **form)
    is_row = slots >= 0
    assert_matches(out[is_row], wanted[is_row])
    assert torch.equal(bits(out[~is_row]), bits(wanted[~is_row]))
    used = torch.zeros(len(states), dtype=torch.bool)
    used[slots[is_row].long()] = is_state_kept
    assert_matches(states[used], wanted_states[used])
    assert torch.equal(bits(states[~used]), bits(before[~used]))
    if intermediate is not None and wanted_between is not None:
        is_written = ~wanted_between.states.isnan()
        assert torch.equal(~intermediate.states.isnan(), is_written)
        assert_matches(intermediate.states[is_written], wanted_between.states[is_written])
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("state_size", [1, 16, 24, 33, 128])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_states_move_on_by_one_step(num_groups: int, state_size: int, dtype: torch.dtype) -> None:
    """Sequences in any order of slots, rows of padding among them; slots of no sequence keep every bit."""
    states = states_of(4, state_size, dtype)
    states[1] = torch.nan
    check(layer_of(state_size), steps_of(3, 1, state_size, dtype, num_groups=num_groups), states, slots_of(3, -1, 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_steps_with_the_states_between_in_rows_of_their_own(dtype: torch.dtype) -> None:
    """Goal: rows are found by their own indices, not by slots. Method: fewer rows than slots, a slot beyond the last row."""
    states, rows = states_of(6, 16, dtype), poisoned(2, 4, NUM_HEADS, HEAD_DIM, 16, dtype=dtype)
    intermediate = Intermediate(rows, slots_of(1, -1, 0, -1))
    check(layer_of(16), steps_of(4, 3, 16, dtype), states, slots_of(5, 2, 3, -1), intermediate=intermediate)
    assert rows[:, 3].isnan().all()


def test_without_keeping_it_the_state_stays_bit_for_bit() -> None:
    states, rows = states_of(2, 16), poisoned(2, 3, NUM_HEADS, HEAD_DIM, 16, dtype=torch.float32)
    check(
        layer_of(16),
        steps_of(2, 3, 16),
        states,
        slots_of(1, 0),
        intermediate=Intermediate(rows, slots_of(0, 1)),
        is_state_kept=False,
    )


def test_the_state_between_is_the_state_after_as_many_steps() -> None:
    """Goal: going back to a step is as if the later ones had not been. Method: a state between against a shorter call."""
    layer, steps, states = layer_of(16), steps_of(1, 4, 16), states_of(1, 16)
    rows, short_states = poisoned(1, 4, NUM_HEADS, HEAD_DIM, 16, dtype=torch.float32), states.clone()
    launch.selective_state_update(layer, steps, states, slots_of(0), intermediate=Intermediate(rows, slots_of(0)))
    x, dt, b, c, z = (each[:, :2] for each in (steps.x, steps.dt, steps.b, steps.c, steps.z))
    launch.selective_state_update(layer, Steps(x, dt, b, c, z), short_states, slots_of(0))
    assert torch.equal(rows[:, 1], short_states)
    assert torch.equal(rows[:, 3], states)


@pytest.mark.parametrize(
    "form",
    [{"d": None}, {"dt_bias": None}, {"is_softplus": False}, {"d": None, "dt_bias": None, "is_softplus": False}],
    ids=["no-d", "no-bias", "no-softplus", "bare"],
)
@pytest.mark.parametrize("is_per_head", [False, True], ids=["per-channel", "per-head"])
def test_parts_may_be_absent_or_shared_by_a_head(form: dict[str, Any], is_per_head: bool) -> None:
    steps = steps_of(2, 2, 16, has_z=False)
    if is_per_head:
        steps = dataclasses.replace(steps, dt=normal(2, 2, NUM_HEADS)[..., None].expand(-1, -1, -1, HEAD_DIM))
    # Without softplus dt must be positive, or states explode.
    steps = steps if form.get("is_softplus", True) else dataclasses.replace(steps, dt=steps.dt.abs())
    layer = layer_of(16, is_per_head=is_per_head, **form)
    layer = layer if layer.is_softplus or layer.dt_bias is None else dataclasses.replace(layer, dt_bias=layer.dt_bias.abs())
    check(layer, steps, states_of(2, 16), slots_of(0, 1))


def test_softplus_is_exact_far_from_zero() -> None:
    """Goal: no loss where exp(dt) is small beside 1, or too large. Method: one channel each, the state is dt times x times b.

    A GPU's exp(dt) is a power of 2 whose exponent, dt times log2(e), is rounded once: by one part in 2^24 of itself, which is
    |dt| 2^-24 of the result. On an H100 it was 2.4e-6 at -60.
    """
    dt = torch.tensor([-60.0, -30.0, -15.0, -5.0, 0.0, 5.0, 19.9, 20.1, 60.0, 200.0]).expand(1, 1, NUM_HEADS, HEAD_DIM)
    ones = torch.ones(1, 1, 1, 1)
    steps, states = Steps(torch.ones_like(dt), dt, ones, ones), torch.zeros(1, NUM_HEADS, HEAD_DIM, 1)
    layer = Recurrence(torch.zeros(NUM_HEADS, HEAD_DIM, 1), is_softplus=True)
    launch.selective_state_update(layer, steps, states, slots_of(0))
    wanted = torch.nn.functional.softplus(dt[0, 0].double())
    bound = 1e-6 + dt[0, 0].abs() * 2.0**-24
    assert ((states[0, :, :, 0].double() / wanted - 1).abs() < bound).all()


def test_strides_and_gaps() -> None:
    """Inputs out of one fused projection, states of a slice, a strided output whose gaps stay as they were."""
    steps = steps_of(3, 2, 16)
    far = Steps(*(strided(each, dim=1, gap=5) for each in (steps.x, steps.dt, steps.b, steps.c, steps.z)))
    all_states = normal(4, NUM_HEADS + 1, HEAD_DIM, 20)
    states = all_states[:, 1:, :, :16]
    outside = all_states[..., 16:].clone(), all_states[:, 0].clone()
    out = strided(poisoned(3, 2, NUM_HEADS, HEAD_DIM, dtype=torch.float32), dim=1)
    check(layer_of(16), far, states, slots_of(2, 0, 3), out=out)
    assert torch.equal(all_states[..., 16:], outside[0])
    assert torch.equal(all_states[:, 0], outside[1])
    assert out.as_strided((5, 3), (43, 1), 40).isnan().all()


def test_the_result_may_take_the_place_of_the_input() -> None:
    layer, steps, states = layer_of(16), steps_of(2, 3, 16), states_of(2, 16)
    wanted = check(layer, steps, states.clone(), slots_of(0, 1))
    out = launch.selective_state_update(layer, steps, states, slots_of(0, 1), out=steps.x)
    assert torch.equal(out, wanted)


def test_a_row_of_padding_keeps_what_was_in_the_output() -> None:
    steps, states, out = steps_of(2, 1, 16), states_of(2, 16), normal(2, 1, NUM_HEADS, HEAD_DIM)
    steps.x[0], steps.b[0] = torch.nan, torch.nan
    before = out.clone()
    launch.selective_state_update(layer_of(16), steps, states, slots_of(-1, 0), out=out)
    assert torch.equal(out[0], before[0])
    assert out.isfinite().all()
    assert states.isfinite().all()


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    layer, steps, states = layer_of(16), steps_of(5, 1, 16, torch.bfloat16), states_of(5, 16)
    alone_states = states.clone()
    together = check(layer, steps, states, slots_of(0, 1, 2, 3, 4))
    alone = Steps(*(each[3:4] for each in (steps.x, steps.dt, steps.b, steps.c, steps.z)))
    assert torch.equal(launch.selective_state_update(layer, alone, alone_states, slots_of(3)), together[3:4])
    assert torch.equal(alone_states[3], states[3])


def test_an_empty_batch_changes_nothing() -> None:
    states = states_of(2, 16)
    before = states.clone()
    assert launch.selective_state_update(layer_of(16), steps_of(0, 1, 16), states, slots_of()).shape == (0, 1, NUM_HEADS, HEAD_DIM)
    assert launch.selective_state_update(layer_of(16), steps_of(1, 0, 16), states, slots_of(0)).shape == (1, 0, NUM_HEADS, HEAD_DIM)
    assert torch.equal(states, before)


def test_offsets_reach_past_two_to_the_31() -> None:
    """Goal: no 32-bit product of a stride. Method: slots, rows and steps lie 2^31 elements on, in memory never touched before."""
    layer, steps, states = layer_of(8), steps_of(2, 2, 8, torch.float16), states_of(3, 8, torch.float16)
    size = NUM_HEADS * HEAD_DIM * 8
    far = lazy_zeros(5, 2**29 + 1, dtype=torch.float16)
    far_states = far[::2, :size].unflatten(1, (NUM_HEADS, HEAD_DIM, 8))
    far_rows = far[::4, size : 3 * size].unflatten(1, (2, NUM_HEADS, HEAD_DIM, 8))
    far_states.copy_(states)
    intermediate = Intermediate(poisoned(2, 2, NUM_HEADS, HEAD_DIM, 8, dtype=torch.float16), slots_of(1, 0))
    wanted = check(layer, steps, states, slots_of(2, 0), intermediate=intermediate)
    out = launch.selective_state_update(
        layer, steps, far_states, slots_of(2, 0), intermediate=Intermediate(far_rows, intermediate.indices)
    )
    assert torch.equal(out, wanted)
    assert torch.equal(far_states, states)
    assert torch.equal(far_rows, intermediate.states)


# Refusals


def test_wrong_arguments_are_named() -> None:
    layer, steps, states = layer_of(16), steps_of(2, 2, 16), states_of(3, 16)
    rows = torch.zeros(2, 2, NUM_HEADS, HEAD_DIM, 16)
    good: dict[str, Any] = {"layer": layer, "steps": steps, "states": states, "slots": slots_of(0, 1)}
    replace = dataclasses.replace
    for name, value, message in (
        ("steps", replace(steps, x=steps.x.int()), r"x must have or be torch.float32 or .*, got torch.int32"),
        ("steps", replace(steps, dt=steps.dt[:1]), r"dt must have or be shape \(2, 2, 4, 10\), got shape \(1, 2, 4, 10\)"),
        ("steps", steps_of(2, 2, 16, num_groups=3), "b must have or be groups that divide 4 heads, got 3"),
        ("steps", replace(steps, c=steps.c[..., :15]), r"c must have or be shape \(2, 2, 2, 16\), got shape \(2, 2, 2, 15\)"),
        ("steps", replace(steps, z=steps.z.to("meta")), f"z must have or be device {states.device}, got device meta"),
        ("states", states[:, :3], r"states must have or be shape \(any, 4, 10, any\), got shape \(3, 3, 10, 16\)"),
        ("states", states_of(3, 257), "states must have or be a state size of 1 to 256, got 257"),
        ("states", states.mT.contiguous().mT, "states must have or be stride 1 in the last dimension"),
        ("slots", slots_of(0), r"slots must have or be shape \(2\), got shape \(1,\)"),
        ("layer", replace(layer, a=layer.a[0]), r"a must have or be shape \(4, 10, 16\), got shape \(10, 16\)"),
        ("layer", replace(layer, d=layer.d[:, :1]), r"d must have or be shape \(4, 10\), got shape \(4, 1\)"),
        ("intermediate", Intermediate(rows[:, :1], slots_of(0, 1)), "intermediate.states must have or be 2 steps or more, got 1"),
        ("intermediate", Intermediate(rows, slots_of(0)), r"intermediate.indices must have or be shape \(2\), got shape \(1,\)"),
        ("out", steps.x.half(), "out must have or be torch.float32, got torch.float16"),
    ):
        with pytest.raises(KernelArgumentError, match=f"selective_state_update: {message}"):
            launch.selective_state_update(**(good | {name: value}))
