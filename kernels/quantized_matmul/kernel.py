"""Triton kernels of `quantized_matmul`: products with weights of 4 and of 8 bits, of which some quantise activations
as well, and what does that.

See README.md. In all products a program owns BLOCK_M tokens and BLOCK_N outputs, and walks the inputs in one order that depends on
nothing else: a token's result does not depend on its neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def block_of_program(num_blocks_m, num_blocks_n, GROUP_M: tl.constexpr):
    """Give this program's block of tokens and of outputs. GROUP_M blocks of tokens walk the outputs together, for the cache."""
    program = tl.program_id(0)
    num_in_group = GROUP_M * num_blocks_n
    first_m = program // num_in_group * GROUP_M
    num_m = min(num_blocks_m - first_m, GROUP_M)
    return first_m + program % num_in_group % num_m, program % num_in_group // num_m


@triton.jit
def round_to_even(x):
    """Round float32 of a magnitude below 2^22 to the nearest integer, ties to even: beyond 1.5 * 2^23 a float32 has no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def decode_fp8(bits):
    """Read e4m3fn from uint8, exactly, as float16: its exponent's bias is 7, float16's 15, so the moved bits are 2^8 too small."""
    wide = bits.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half).to(tl.float16)


@triton.jit
def encode_fp8(x):
    """Write float32 of a magnitude up to 448 as e4m3fn in uint8, ties to even; no instruction that only some GPUs have is used."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Round to 3 bits of mantissa and move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9; 2^14 + x has no finer ones, and its last bits count them.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def unpack_words(words, shifts, BLOCK: tl.constexpr):
    """Take eight 4-bit numbers out of each int32: `[BLOCK / 8]` words become `[BLOCK]` numbers."""
    return tl.reshape((words[:, None] >> shifts[None, :]) & 15, (BLOCK,))


@triton.jit
def load_w4(
    qweight_ptr,
    columns_first,
    first,
    num_inputs,
    num_outputs,
    stride_row,
    IS_AWQ: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load a tile of 4-bit values as int32 `[BLOCK_K, BLOCK_N]`; each word is read once."""
    eighth = tl.arange(0, 8)
    if IS_AWQ:
        # Column c of eight stands in bits 4 p(c), p = 0 4 1 5 2 6 3 7.
        shifts = ((eighth & 1) * 4 + (eighth >> 1)) * 4
        rows = first + tl.arange(0, BLOCK_K)
        words_first = columns_first // 8
        places = words_first + tl.arange(0, BLOCK_N // 8)
        inside = (rows < num_inputs)[:, None] & (places < num_outputs // 8)[None, :]
        words = tl.load(qweight_ptr + rows.to(tl.int64)[:, None] * stride_row + places[None, :], mask=inside, other=0)
        values = (words[:, :, None] >> shifts[None, None, :]) & 15
    else:
        shifts = eighth * 4
        rows = first // 8 + tl.arange(0, BLOCK_K // 8)
        columns = columns_first + tl.arange(0, BLOCK_N)
        inside = (rows < num_inputs // 8)[:, None] & (columns < num_outputs)[None, :]
        words = tl.load(qweight_ptr + rows.to(tl.int64)[:, None] * stride_row + columns[None, :], mask=inside, other=0)
        values = (words[:, None, :] >> shifts[None, :, None]) & 15
    return tl.reshape(values, (BLOCK_K, BLOCK_N))


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_matmul_w4a16_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    minimums_ptr,
    group_index_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    group_size,
    zero_offset,
    stride_x_token,
    stride_qweight_row,
    stride_scales_group,
    stride_qzeros_group,
    stride_minimums_group,
    stride_out_token,
    IS_AWQ: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    HAS_GROUP_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`out = x @ ((values - zeros) * scales) + bias`, sums in float32; with minimums `values * scales + minimums`.

    Where groups are runs of inputs, a step of BLOCK_K inputs lies in one group: `values - zeros` goes into the product as the small
    integer it is, exact in every type, and the sum is scaled; minimums are multiplied by the sum of the inputs. With a group index,
    weights are scaled before the product.
    """
    block_m, block_n = block_of_program(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N), GROUP_M)
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    words = block_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    is_token, is_column, is_word = tokens < num_tokens, columns < num_outputs, words < num_outputs // 8
    steps = tl.arange(0, BLOCK_K)
    eighth = tl.arange(0, 8)
    shifts = ((eighth & 1) * 4 + (eighth >> 1)) * 4 if IS_AWQ else eighth * 4
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x_token + steps[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK_K):
        is_step = first + steps < num_inputs
        x = tl.load(x_ptrs + first, mask=is_token[:, None] & is_step[None, :], other=0.0)
        values = load_w4(
            qweight_ptr, block_n * BLOCK_N, first, num_inputs, num_outputs, stride_qweight_row, IS_AWQ, BLOCK_N, BLOCK_K
        )
        if HAS_GROUP_INDEX:
            groups = tl.load(group_index_ptr + first + steps, mask=is_step, other=0).to(tl.int64)  # [BLOCK_K]
            inside = is_step[:, None] & is_column[None, :]
            scales = tl.load(scales_ptr + groups[:, None] * stride_scales_group + columns[None, :], mask=inside, other=0.0)
            zeros = tl.full((BLOCK_K, BLOCK_N), 8, tl.int32)
            if HAS_ZEROS:
                zero_ptrs = qzeros_ptr + groups[:, None] * stride_qzeros_group + words[None, :]
                zero_words = tl.load(zero_ptrs, mask=is_step[:, None] & is_word[None, :], other=0)
                zeros = tl.reshape((zero_words[:, :, None] >> shifts[None, None, :]) & 15, (BLOCK_K, BLOCK_N))
                zeros = (zeros + zero_offset) & 15
            weight = ((values - zeros).to(tl.float32) * scales.to(tl.float32)).to(x.dtype)
            total = tl.dot(x, weight, total, input_precision="ieee")
        else:
            group = (first // group_size).to(tl.int64)
            scales = tl.load(scales_ptr + group * stride_scales_group + columns, mask=is_column, other=0.0)  # [BLOCK_N]
            zeros = tl.full((BLOCK_N,), 0 if HAS_MINIMUMS else 8, tl.int32)
            if HAS_ZEROS:
                zero_words = tl.load(qzeros_ptr + group * stride_qzeros_group + words, mask=is_word, other=0)
                zeros = (unpack_words(zero_words, shifts, BLOCK_N) + zero_offset) & 15
            part = tl.dot(x, (values - zeros[None, :]).to(tl.float32).to(x.dtype), input_precision="ieee")
            total += part * scales.to(tl.float32)[None, :]
            if HAS_MINIMUMS:
                minimums = tl.load(minimums_ptr + group * stride_minimums_group + columns, mask=is_column, other=0.0)
                total += tl.sum(x.to(tl.float32), axis=1)[:, None] * minimums.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * stride_out_token + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_matmul_w8a16_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    group_size,
    zero,
    stride_x_token,
    stride_codes_row,
    stride_scales_group,
    stride_minimums_group,
    stride_out_token,
    IS_FLOAT8: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`out = x @ ((codes - zero) * scales) + bias`, sums in float32; with minimums `codes * scales + minimums`.

    A step of BLOCK_K inputs lies in one group. What goes into the product is exact in every type, an integer of up to 8 bits or an
    e4m3fn, and the sum is scaled; minimums are multiplied by the sum of the inputs.
    """
    block_m, block_n = block_of_program(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N), GROUP_M)
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = tokens < num_tokens, columns < num_outputs
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x_token + steps[None, :]
    code_ptrs = codes_ptr + columns.to(tl.int64)[None, :] * stride_codes_row + steps[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        is_step = start + steps < num_inputs
        x = tl.load(x_ptrs + start, mask=is_token[:, None] & is_step[None, :], other=0.0)
        codes = tl.load(code_ptrs + start, mask=is_step[:, None] & is_column[None, :], other=0)
        weight = decode_fp8(codes).to(tl.float32) if IS_FLOAT8 else (codes.to(tl.int32) - zero).to(tl.float32)
        group = (start // group_size).to(tl.int64)
        scales = tl.load(scales_ptr + group * stride_scales_group + columns, mask=is_column, other=0.0)  # [BLOCK_N]
        total += tl.dot(x, weight.to(x.dtype), input_precision="ieee") * scales.to(tl.float32)[None, :]
        if HAS_MINIMUMS:
            minimums = tl.load(minimums_ptr + group * stride_minimums_group + columns, mask=is_column, other=0.0)
            total += tl.sum(x.to(tl.float32), axis=1)[:, None] * minimums.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * stride_out_token + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_matmul_int8_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    stride_x_token,
    stride_weight_row,
    stride_out_token,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`out = (x @ weight.T) * x_scale * weight_scale + bias`; the sum is int32 and exact."""
    block_m, block_n = block_of_program(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N), GROUP_M)
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = tokens < num_tokens, columns < num_outputs
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x_token + steps[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight_row + steps[:, None]
    exact = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for first in range(0, num_inputs, BLOCK_K):
        is_step = first + steps < num_inputs
        x = tl.load(x_ptrs + first, mask=is_token[:, None] & is_step[None, :], other=0)
        weight = tl.load(weight_ptrs + first, mask=is_step[:, None] & is_column[None, :], other=0)
        exact = tl.dot(x, weight, exact, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + tokens, mask=is_token, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + columns, mask=is_column, other=0.0)
    total = exact.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * stride_out_token + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_matmul_fp8_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    stride_x_token,
    stride_x_scale_token,
    stride_x_scale_group,
    stride_weight_row,
    stride_weight_scale_row,
    stride_out_token,
    IS_NATIVE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`out = sum over groups of 128 inputs of (x @ weight.T) * x_scale * weight_scale`, plus bias.

    BLOCK_K inputs lie in one group and BLOCK_N outputs in one block of weights. Each step's product is a sum of its own, scaled and
    added in float32: Hopper's FP8 units keep few bits of a running sum, enough for 128 terms and not for thousands. Where the
    hardware has no e4m3fn, IS_NATIVE is False, the pointers are uint8, and the operands are decoded to float16, exactly.
    """
    block_m, block_n = block_of_program(tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N), GROUP_M)
    tokens = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_column = tokens < num_tokens, columns < num_outputs
    steps = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x_token + steps[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight_row + steps[:, None]
    x_scale_ptrs = x_scale_ptr + tokens.to(tl.int64) * stride_x_scale_token
    weight_scale_ptr += (block_n * BLOCK_N // 128).to(tl.int64) * stride_weight_scale_row
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK_K):
        is_step = first + steps < num_inputs
        group = first // 128
        x_mask, weight_mask = is_token[:, None] & is_step[None, :], is_step[:, None] & is_column[None, :]
        if IS_NATIVE:
            x = tl.load(x_ptrs + first, mask=x_mask, other=0.0)
            weight = tl.load(weight_ptrs + first, mask=weight_mask, other=0.0)
        else:
            x = decode_fp8(tl.load(x_ptrs + first, mask=x_mask, other=0))
            weight = decode_fp8(tl.load(weight_ptrs + first, mask=weight_mask, other=0))
        x_scale = tl.load(x_scale_ptrs + group * stride_x_scale_group, mask=is_token, other=0.0)  # [BLOCK_M]
        weight_scale = tl.load(weight_scale_ptr + group)
        total += tl.dot(x, weight) * (x_scale * weight_scale)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * stride_out_token + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def quantized_matmul_quantize_int8_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_inputs,
    stride_x_token,
    stride_out_token,
    BLOCK: tl.constexpr,
):
    """Quantise one token a program: the largest magnitude first, then the codes; the second walk reads from the cache."""
    token = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK):
        x = tl.load(x_ptr + token * stride_x_token + first + steps, mask=first + steps < num_inputs, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.div_rn(tl.maximum(tl.max(largest, axis=0), 1e-10), 127.0)
    tl.store(scale_ptr + token, scale)
    for first in range(0, num_inputs, BLOCK):
        is_step = first + steps < num_inputs
        x = tl.load(x_ptr + token * stride_x_token + first + steps, mask=is_step, other=0.0).to(tl.float32)
        code = round_to_even(tl.div_rn(x, tl.zeros_like(x) + scale))
        code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        tl.store(out_ptr + token * stride_out_token + first + steps, code.to(tl.int8), mask=is_step)


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_matmul_quantize_fp8_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    num_tokens,
    num_inputs,
    stride_x_token,
    stride_out_token,
    stride_scale_token,
    stride_scale_group,
    BLOCK_TOKENS: tl.constexpr,
):
    """Quantise BLOCK_TOKENS tokens of one group of 128 inputs a program."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    group = tl.program_id(1)
    steps = group * 128 + tl.arange(0, 128)
    is_token = tokens < num_tokens
    inside = is_token[:, None] & (steps < num_inputs)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_x_token + steps[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10), 448.0)  # [BLOCK_TOKENS]
    tl.store(scale_ptr + tokens * stride_scale_token + group * stride_scale_group, scale, mask=is_token)
    scaled = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    tl.store(out_ptr + tokens[:, None] * stride_out_token + steps[None, :], encode_fp8(scaled), mask=inside)
