"""Triton kernels of `causal_conv1d`: prefill of sequences of any lengths, and update by a few tokens each. See README.md."""

import triton
import triton.language as tl


@triton.jit
def move_state_on(
    x_ptrs,
    state_ptr,
    num_tokens,
    channels,
    is_channel,
    oldest,
    stride_x_token,
    stride_state_dim,
    stride_state_column,
    STATE_LEN: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """Make the last STATE_LEN of (state, inputs) the new state, after every thread of the program has read the old one.

    Elements of the state are read by other threads than those that write them, here and in the convolution before: without the
    barrier one thread may overwrite what another has yet to read. What is older than the time `oldest` counts as zeros.
    """
    columns = tl.arange(0, BLOCK_STATE)
    moved = columns + num_tokens  # where in (state, inputs) a column comes from
    inside = is_channel[:, None] & (columns < STATE_LEN)[None, :]
    is_old = (moved < STATE_LEN) & (moved >= oldest + STATE_LEN)
    old_ptrs = state_ptr + channels[:, None] * stride_state_dim + moved.to(tl.int64)[None, :] * stride_state_column
    old = tl.load(old_ptrs, mask=inside & is_old[None, :], other=0.0)
    new_ptrs = x_ptrs[:, None] + (moved - STATE_LEN).to(tl.int64)[None, :] * stride_x_token
    new = tl.load(new_ptrs, mask=inside & (moved >= STATE_LEN)[None, :], other=0.0)
    state = tl.where((moved < STATE_LEN)[None, :], old.to(tl.float32), new.to(tl.float32))  # [BLOCK_DIM, BLOCK_STATE]
    tl.debug_barrier()
    state_ptrs = state_ptr + channels[:, None] * stride_state_dim + columns.to(tl.int64)[None, :] * stride_state_column
    tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convolve(
    x_ptrs,
    state_ptr,
    weight_ptr,
    bias_ptr,
    first,
    num_tokens,
    channels,
    is_channel,
    oldest,
    stride_x_token,
    stride_state_dim,
    stride_state_column,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE_LEN: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Compute the outputs of a sequence from the time `first` on, `[BLOCK_TIME, BLOCK_DIM]` in float32.

    Inputs of negative times come from the state; those before `oldest` are zeros.
    """
    times = first + tl.arange(0, BLOCK_TIME)
    inside = (times < num_tokens)[:, None] & is_channel[None, :]
    total = tl.zeros((BLOCK_TIME, BLOCK_DIM), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + channels * WIDTH + tap, mask=is_channel, other=0.0).to(tl.float32)  # [BLOCK_DIM]
        sources = times - (WIDTH - 1) + tap
        new_ptrs = x_ptrs[None, :] + sources.to(tl.int64)[:, None] * stride_x_token
        new = tl.load(new_ptrs, mask=inside & (sources >= 0)[:, None], other=0.0).to(tl.float32)
        if first < WIDTH - 1:
            columns = (STATE_LEN + sources).to(tl.int64)
            old_ptrs = state_ptr + channels[None, :] * stride_state_dim + columns[:, None] * stride_state_column
            new += tl.load(old_ptrs, mask=inside & ((sources < 0) & (sources >= oldest))[:, None], other=0.0).to(tl.float32)
        total += weight[None, :] * new
    if IS_SILU:
        total = total * tl.sigmoid(total)
    return total


@triton.jit
def causal_conv1d_prefill_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    starts_ptr,
    slots_ptr,
    has_initial_state_ptr,
    out_ptr,
    dim,
    stride_x_token,
    stride_state_slot,
    stride_state_dim,
    stride_state_column,
    stride_out_token,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE_LEN: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """A program owns BLOCK_TIME tokens of one sequence and BLOCK_DIM channels.

    The program of a sequence's first tokens alone reads the state (BLOCK_TIME >= WIDTH - 1), and so it is the one that moves it on:
    no other program is to be waited for.
    """
    sequence = tl.program_id(2)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    begin = tl.load(starts_ptr + sequence).to(tl.int64)
    length = (tl.load(starts_ptr + sequence + 1).to(tl.int64) - begin).to(tl.int32)
    first = tl.program_id(0) * BLOCK_TIME
    if (slot < 0) | ((first >= length) & (first > 0)):
        return
    oldest = tl.where(tl.load(has_initial_state_ptr + sequence) != 0, -STATE_LEN, 0)
    channels = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_channel = channels < dim
    channels = channels.to(tl.int64)
    times = first + tl.arange(0, BLOCK_TIME)
    is_time = times < length
    x_ptrs = x_ptr + begin * stride_x_token + channels
    state_ptr += slot * stride_state_slot
    y = convolve(
        x_ptrs, state_ptr, weight_ptr, bias_ptr, first, length, channels, is_channel, oldest,
        stride_x_token, stride_state_dim, stride_state_column, HAS_BIAS, IS_SILU, WIDTH, STATE_LEN, BLOCK_TIME, BLOCK_DIM,
    )  # fmt: skip
    out_ptrs = out_ptr + (begin + times)[:, None] * stride_out_token + channels[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_time[:, None] & is_channel[None, :])
    if first == 0:
        move_state_on(
            x_ptrs, state_ptr, length, channels, is_channel, oldest,
            stride_x_token, stride_state_dim, stride_state_column, STATE_LEN, BLOCK_STATE,
        )  # fmt: skip


@triton.jit
def causal_conv1d_update_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    slots_ptr,
    out_ptr,
    dim,
    num_steps,
    stride_x_sequence,
    stride_x_step,
    stride_state_slot,
    stride_state_dim,
    stride_state_column,
    stride_out_sequence,
    stride_out_step,
    HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    STATE_LEN: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """A program owns all steps (at most BLOCK_TIME) of one sequence and BLOCK_DIM channels, their state with them."""
    sequence = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot < 0:
        return
    channels = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    is_channel = channels < dim
    channels = channels.to(tl.int64)
    times = tl.arange(0, BLOCK_TIME)
    is_time = times < num_steps
    x_ptrs = x_ptr + sequence * stride_x_sequence + channels
    state_ptr += slot * stride_state_slot
    y = convolve(
        x_ptrs, state_ptr, weight_ptr, bias_ptr, 0, num_steps, channels, is_channel, -STATE_LEN,
        stride_x_step, stride_state_dim, stride_state_column, HAS_BIAS, IS_SILU, WIDTH, STATE_LEN, BLOCK_TIME, BLOCK_DIM,
    )  # fmt: skip
    out_ptrs = out_ptr + sequence * stride_out_sequence + times.to(tl.int64)[:, None] * stride_out_step + channels[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_time[:, None] & is_channel[None, :])
    move_state_on(
        x_ptrs, state_ptr, num_steps, channels, is_channel, -STATE_LEN,
        stride_x_step, stride_state_dim, stride_state_column, STATE_LEN, BLOCK_STATE,
    )  # fmt: skip
