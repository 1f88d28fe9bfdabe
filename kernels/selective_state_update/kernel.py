"""The Triton kernel of `selective_state_update`. See README.md."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), x itself above 20 as torch has it; without log1p's loss where exp(x) is small beside 1."""
    exponential = tl.exp(tl.minimum(x, 20.0))
    rounded = 1.0 + exponential
    is_lost = rounded == 1.0
    accurate = tl.log(rounded) * (exponential / tl.where(is_lost, 1.0, rounded - 1.0))
    return tl.where(x > 20.0, x, tl.where(is_lost, exponential, accurate))


@triton.jit
def selective_state_update_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    z_ptr,
    dt_bias_ptr,
    slots_ptr,
    intermediate_ptr,
    intermediate_indices_ptr,
    out_ptr,
    num_steps,
    head_dim,
    state_size,
    heads_per_group,
    stride_state_slot,
    stride_state_head,
    stride_state_dim,
    stride_x_sequence,
    stride_x_step,
    stride_x_head,
    stride_dt_sequence,
    stride_dt_step,
    stride_dt_head,
    stride_dt_dim,
    stride_a_head,
    stride_a_dim,
    stride_a_state,
    stride_b_sequence,
    stride_b_step,
    stride_b_group,
    stride_c_sequence,
    stride_c_step,
    stride_c_group,
    stride_d_head,
    stride_d_dim,
    stride_z_sequence,
    stride_z_step,
    stride_z_head,
    stride_dt_bias_head,
    stride_dt_bias_dim,
    stride_intermediate_row,
    stride_intermediate_step,
    stride_intermediate_head,
    stride_intermediate_dim,
    stride_out_sequence,
    stride_out_step,
    stride_out_head,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    IS_SOFTPLUS: tl.constexpr,
    IS_STATE_KEPT: tl.constexpr,
    HAS_INTERMEDIATE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """A program owns BLOCK_DIM channels of one head of one sequence: their state, in float32 registers, through all steps."""
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot < 0:
        return
    group = head // heads_per_group
    dims = (tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)).to(tl.int64)
    places = tl.arange(0, BLOCK_STATE)
    is_dim, is_place = dims < head_dim, places < state_size
    inside = is_dim[:, None] & is_place[None, :]
    state_ptrs = state_ptr + slot * stride_state_slot + head * stride_state_head
    state_ptrs += dims[:, None] * stride_state_dim + places[None, :]
    state = tl.load(state_ptrs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_DIM, BLOCK_STATE]
    a_ptrs = a_ptr + head * stride_a_head + dims[:, None] * stride_a_dim + places[None, :] * stride_a_state
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    if HAS_D:
        d = tl.load(d_ptr + head * stride_d_head + dims * stride_d_dim, mask=is_dim, other=0.0).to(tl.float32)
    if HAS_DT_BIAS:
        dt_bias_ptrs = dt_bias_ptr + head * stride_dt_bias_head + dims * stride_dt_bias_dim
        dt_bias = tl.load(dt_bias_ptrs, mask=is_dim, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + sequence * stride_x_sequence + head * stride_x_head + dims
    dt_ptrs = dt_ptr + sequence * stride_dt_sequence + head * stride_dt_head + dims * stride_dt_dim
    b_ptrs = b_ptr + sequence * stride_b_sequence + group * stride_b_group + places
    c_ptrs = c_ptr + sequence * stride_c_sequence + group * stride_c_group + places
    z_ptrs = z_ptr + sequence * stride_z_sequence + head * stride_z_head + dims if HAS_Z else x_ptrs
    out_ptrs = out_ptr + sequence * stride_out_sequence + head * stride_out_head + dims
    if HAS_INTERMEDIATE:
        row = tl.load(intermediate_indices_ptr + sequence).to(tl.int64)
        intermediate_ptrs = intermediate_ptr + row * stride_intermediate_row + head * stride_intermediate_head
        intermediate_ptrs += dims[:, None] * stride_intermediate_dim + places[None, :]
    for _ in range(num_steps):
        x = tl.load(x_ptrs, mask=is_dim, other=0.0).to(tl.float32)
        dt = tl.load(dt_ptrs, mask=is_dim, other=0.0).to(tl.float32)
        if HAS_DT_BIAS:
            dt += dt_bias
        if IS_SOFTPLUS:
            dt = softplus(dt)
        b = tl.load(b_ptrs, mask=is_place, other=0.0).to(tl.float32)
        c = tl.load(c_ptrs, mask=is_place, other=0.0).to(tl.float32)
        state = state * tl.exp(dt[:, None] * a) + (dt * x)[:, None] * b[None, :]
        if HAS_INTERMEDIATE:
            if row >= 0:
                tl.store(intermediate_ptrs, state.to(intermediate_ptr.dtype.element_ty), mask=inside)
            intermediate_ptrs += stride_intermediate_step
        y = tl.sum(state * c[None, :], axis=1)
        if HAS_D:
            y += d * x
        if HAS_Z:
            z = tl.load(z_ptrs, mask=is_dim, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
            z_ptrs += stride_z_step
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_dim)
        x_ptrs += stride_x_step
        dt_ptrs += stride_dt_step
        b_ptrs += stride_b_step
        c_ptrs += stride_c_step
        out_ptrs += stride_out_step
    if IS_STATE_KEPT:
        # A tile with fewer elements than the program has threads is held by several of them; all must have read before one writes.
        tl.debug_barrier()
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=inside)
