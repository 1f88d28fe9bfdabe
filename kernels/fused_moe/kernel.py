"""Triton kernels of `fused_moe`: route, count, place and order by expert, two grouped products, sum. README.md tells the whole.

An *assignment* is a pair of token and choice, numbered `token * TOP_K + choice`. The order lists assignments by expert; each
expert's range in it is padded to whole blocks of BLOCK_M rows, so that a program of a grouped product meets one expert only.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def fused_moe_route_kernel(
    logits_ptr,
    selection_bias_ptr,
    weights_ptr,
    experts_ptr,
    num_tokens,
    num_experts,
    stride_logits_token,
    scale,
    TOP_K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
):
    """Choose TOP_K experts a token: a program owns BLOCK_TOKENS rows of logits and ranks them in float32.

    An expert's rank and its number are packed in one int64 whose order is that of the ranks, the lower number first among equals:
    a maximum finds both at once, and always the same.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    experts = tl.arange(0, BLOCK_EXPERTS)
    choices = tl.arange(0, BLOCK_CHOICES)
    is_expert = experts < num_experts
    inside = (tokens < num_tokens)[:, None] & is_expert[None, :]
    offsets = tokens[:, None] * stride_logits_token + experts[None, :]
    logits = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(is_expert[None, :], logits, float("-inf"))  # [BLOCK_TOKENS, BLOCK_EXPERTS]
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = exponentials / tl.sum(exponentials, axis=1)[:, None]
    rank = logits
    if HAS_SELECTION_BIAS:
        rank = scores + tl.load(selection_bias_ptr + experts, mask=is_expert, other=0.0)[None, :]
    # A sum with 0 turns -0 into 0, which are equals.
    rank = tl.where(rank != rank, float("-inf"), rank) + 0.0
    bits = rank.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - experts).to(tl.int64)[None, :]
    never = tl.full((1, 1), -(2**63), tl.int64)
    packed = tl.where(is_expert[None, :], packed, never)
    weights = tl.zeros((BLOCK_TOKENS, BLOCK_CHOICES), dtype=tl.float32)
    chosen = tl.zeros((BLOCK_TOKENS, BLOCK_CHOICES), dtype=tl.int32)
    for choice in tl.static_range(TOP_K):
        best = 0x7FFFFFFF - (tl.max(packed, axis=1) & 0x7FFFFFFF).to(tl.int32)  # [BLOCK_TOKENS]
        is_best = experts[None, :] == best[:, None]
        weight = tl.sum(tl.where(is_best, scores, 0.0), axis=1)
        weights = tl.where(choices[None, :] == choice, weight[:, None], weights)
        chosen = tl.where(choices[None, :] == choice, best[:, None], chosen)
        packed = tl.where(is_best, never, packed)
    if RENORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, axis=1), 1e-20)[:, None]
    places = tokens[:, None] * TOP_K + choices[None, :]
    is_place = (tokens < num_tokens)[:, None] & (choices < TOP_K)[None, :]
    tl.store(weights_ptr + places, weights * scale, mask=is_place)
    tl.store(experts_ptr + places, chosen, mask=is_place)


@triton.jit(do_not_specialize=["num_assignments"])
def fused_moe_count_kernel(
    experts_ptr,
    counts_ptr,
    num_assignments,
    num_experts,
    CHUNK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Count each expert's assignments: a program owns a chunk of CHUNK and a row of `counts [chunks, num_experts]`."""
    chunk = tl.program_id(0)
    assignments = chunk * CHUNK + tl.arange(0, CHUNK)
    experts = tl.arange(0, BLOCK_EXPERTS)
    mine = tl.load(experts_ptr + assignments, mask=assignments < num_assignments, other=-1)  # [CHUNK]
    counts = tl.histogram(mine, BLOCK_EXPERTS, mask=(mine >= 0) & (mine < num_experts))
    tl.store(counts_ptr + chunk.to(tl.int64) * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_chunks"])
def fused_moe_place_kernel(
    counts_ptr,
    before_ptr,
    ends_ptr,
    totals_ptr,
    num_chunks,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Turn counts into places: one program owns them all.

    `before [chunks, num_experts]` is where in its expert's range a chunk begins; `ends` and `totals` `[num_experts]` are where the
    padded range of an expert ends, and how many assignments it has.
    """
    experts = tl.arange(0, BLOCK_EXPERTS)
    is_expert = experts < num_experts
    totals = tl.zeros((BLOCK_EXPERTS,), dtype=tl.int32)
    for first in range(0, num_chunks, BLOCK_CHUNKS):
        chunks = first + tl.arange(0, BLOCK_CHUNKS)
        inside = (chunks < num_chunks)[:, None] & is_expert[None, :]
        offsets = chunks.to(tl.int64)[:, None] * num_experts + experts[None, :]
        counts = tl.load(counts_ptr + offsets, mask=inside, other=0)  # [BLOCK_CHUNKS, BLOCK_EXPERTS]
        tl.store(before_ptr + offsets, tl.cumsum(counts, axis=0) - counts + totals[None, :], mask=inside)
        totals += tl.sum(counts, axis=0)
    padded = (totals + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    tl.store(ends_ptr + experts, tl.cumsum(padded, axis=0), mask=is_expert)
    tl.store(totals_ptr + experts, totals, mask=is_expert)


@triton.jit(do_not_specialize=["num_assignments"])
def fused_moe_order_kernel(
    experts_ptr,
    before_ptr,
    ends_ptr,
    totals_ptr,
    order_ptr,
    num_assignments,
    num_experts,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write assignments in their order: a program owns CHUNK of them. Rows of padding are not written."""
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    assignments = chunk * CHUNK + local
    mine = tl.load(experts_ptr + assignments, mask=assignments < num_assignments, other=-1)  # [CHUNK]
    is_mine = (mine >= 0) & (mine < num_experts)
    is_earlier = (mine[None, :] == mine[:, None]) & (local[None, :] < local[:, None])
    rank = tl.sum(is_earlier.to(tl.int32), axis=1)
    end = tl.load(ends_ptr + mine, mask=is_mine, other=0)
    total = tl.load(totals_ptr + mine, mask=is_mine, other=0)
    before = tl.load(before_ptr + chunk.to(tl.int64) * num_experts + mine, mask=is_mine, other=0)
    start = end - (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    tl.store(order_ptr + start + before + rank, assignments, mask=is_mine)


@triton.jit
def block_of_program(num_blocks_m, num_blocks_n, GROUP_M: tl.constexpr):
    """Give this program's block of rows and of columns.

    GROUP_M blocks of rows walk the columns together, so that what they read of the weights is read from memory once.
    """
    program = tl.program_id(0)
    num_in_group = GROUP_M * num_blocks_n
    first_m = program // num_in_group * GROUP_M
    num_m = min(num_blocks_m - first_m, GROUP_M)
    return first_m + program % num_in_group % num_m, program % num_in_group // num_m


@triton.jit
def expert_of_block(block_m, ends_ptr, totals_ptr, num_experts, BLOCK_M: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Give the expert of a block of rows (`num_experts` past the last block) and how many of the block's rows are no padding."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    ends = tl.load(ends_ptr + experts, mask=experts < num_experts, other=0x7FFFFFFF)
    expert = tl.sum((ends <= block_m * BLOCK_M).to(tl.int32), axis=0)
    is_expert = expert < num_experts
    total = tl.load(totals_ptr + expert, mask=is_expert, other=0)
    end = tl.load(ends_ptr + expert, mask=is_expert, other=0)
    start = end - (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    return expert, start + total - block_m * BLOCK_M


@triton.jit(do_not_specialize=["num_blocks_m"])
def fused_moe_gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    ends_ptr,
    totals_ptr,
    num_blocks_m,
    num_experts,
    hidden,
    intermediate,
    stride_x_token,
    stride_weight_expert,
    stride_weight_row,
    stride_bias_expert,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """First product and activation: `out[a] = activate(x[a // TOP_K] @ gate.T, x[a // TOP_K] @ up.T)` of the block's expert.

    A program owns BLOCK_M assignments of one expert and BLOCK_N columns of `out [num_assignments, intermediate]`, so BLOCK_N rows
    of gate and as many of up. Both sums are float32.
    """
    block_m, block_n = block_of_program(num_blocks_m, tl.cdiv(intermediate, BLOCK_N), GROUP_M)
    expert, num_rows = expert_of_block(block_m, ends_ptr, totals_ptr, num_experts, BLOCK_M, BLOCK_EXPERTS)
    if expert >= num_experts:
        return
    is_row = tl.arange(0, BLOCK_M) < num_rows
    assignments = tl.load(order_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M), mask=is_row, other=0)  # [BLOCK_M]
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < intermediate
    gate_rows = columns * 2 if IS_INTERLEAVED else columns
    up_rows = gate_rows + (1 if IS_INTERLEAVED else intermediate)
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (assignments // TOP_K).to(tl.int64)[:, None] * stride_x_token + steps[None, :]
    weight_ptr += expert.to(tl.int64) * stride_weight_expert
    gate_ptrs = weight_ptr + gate_rows.to(tl.int64)[None, :] * stride_weight_row + steps[:, None]
    up_ptrs = weight_ptr + up_rows.to(tl.int64)[None, :] * stride_weight_row + steps[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, hidden, BLOCK_K):
        is_step = first + steps < hidden
        x = tl.load(x_ptrs + first, mask=is_row[:, None] & is_step[None, :], other=0.0)
        gate_part = tl.load(gate_ptrs + first, mask=is_step[:, None] & is_column[None, :], other=0.0)
        up_part = tl.load(up_ptrs + first, mask=is_step[:, None] & is_column[None, :], other=0.0)
        gate = tl.dot(x, gate_part, gate, input_precision="ieee")
        up = tl.dot(x, up_part, up, input_precision="ieee")
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * stride_bias_expert
        gate += tl.load(bias_ptr + gate_rows, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + up_rows, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu":
        result = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        result = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    out_ptrs = out_ptr + assignments.to(tl.int64)[:, None] * intermediate + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_blocks_m"])
def fused_moe_down_kernel(
    activated_ptr,
    weight_ptr,
    bias_ptr,
    router_weights_ptr,
    out_ptr,
    order_ptr,
    ends_ptr,
    totals_ptr,
    num_blocks_m,
    num_experts,
    hidden,
    intermediate,
    stride_weight_expert,
    stride_weight_row,
    stride_bias_expert,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Second product, weighted: `out[a] = router_weights[a] * (activated[a] @ down.T + bias)` of the block's expert.

    A program owns BLOCK_M assignments of one expert and BLOCK_N columns of `out [num_assignments, hidden]`. The sum is float32.
    """
    block_m, block_n = block_of_program(num_blocks_m, tl.cdiv(hidden, BLOCK_N), GROUP_M)
    expert, num_rows = expert_of_block(block_m, ends_ptr, totals_ptr, num_experts, BLOCK_M, BLOCK_EXPERTS)
    if expert >= num_experts:
        return
    is_row = tl.arange(0, BLOCK_M) < num_rows
    assignments = tl.load(order_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M), mask=is_row, other=0)  # [BLOCK_M]
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < hidden
    steps = tl.arange(0, BLOCK_K)
    activated_ptrs = activated_ptr + assignments.to(tl.int64)[:, None] * intermediate + steps[None, :]
    weight_ptr += expert.to(tl.int64) * stride_weight_expert
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight_row + steps[:, None]
    result = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, intermediate, BLOCK_K):
        is_step = first + steps < intermediate
        activated = tl.load(activated_ptrs + first, mask=is_row[:, None] & is_step[None, :], other=0.0)
        weight = tl.load(weight_ptrs + first, mask=is_step[:, None] & is_column[None, :], other=0.0)
        result = tl.dot(activated, weight, result, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * stride_bias_expert + columns, mask=is_column, other=0.0)
        result += bias.to(tl.float32)[None, :]
    result *= tl.load(router_weights_ptr + assignments, mask=is_row, other=0.0)[:, None]
    out_ptrs = out_ptr + assignments.to(tl.int64)[:, None] * hidden + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def fused_moe_sum_kernel(
    parts_ptr,
    experts_ptr,
    out_ptr,
    num_experts,
    hidden,
    stride_out_token,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up each token's parts in the order of its choices, in float32: a program owns BLOCK columns of one token.

    A part whose expert is none of ours was never written and is not read.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        assignment = token * TOP_K + choice
        expert = tl.load(experts_ptr + assignment)
        if (expert >= 0) & (expert < num_experts):
            total += tl.load(parts_ptr + assignment * hidden + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * stride_out_token + columns, total.to(out_ptr.dtype.element_ty), mask=is_column)
