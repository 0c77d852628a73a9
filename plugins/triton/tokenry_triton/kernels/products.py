"""Matrix products: rows times weights that may be dense, int8, int4 or float8, alone or by expert.

One accumulator of float32 a program, always from the first column to the last: with one tile the
bits of a row depend on that row alone. A weight of FORMAT
    dense  [out, in] in the dtype of x            int8, fp8  [out, in], one scale an output
    int4   [out, in / 2] uint8, one scale for 32 inputs: byte b of each 32 bytes holds inputs b (low
           four bits) and b + 32 (high) of its 64, as value + 8.
`fp8 rows`: x is float8 too, with a scale a row.
"""

import triton
import triton.language as tl

from tokenry_triton.kernels.attention import request_of
from tokenry_triton.kernels.rows import activation


@triton.jit
def _narrow_weights(bits, scales, group, k, size, column, live, HIGH: tl.constexpr):
    """[K / 2, N] weights of four bits, in float32, of the low or the high halves of bytes."""
    value = (bits >> 4) if HIGH else (bits & 15)
    at = (k[:, None] // 32) * 2 + HIGH
    scale = tl.load(
        scales + column[None, :] * group + at, mask=live[None, :] & (k[:, None] < size), other=0.0
    )
    return (value.to(tl.float32) - 8.0) * scale


@triton.jit
def _accumulate(
    x, there, weight, scales, column, live, size, stride, group,
    FORMAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[M, N] sums of x rows (pointers [M, 1]) times weight rows `column` over `size` inputs.

    stride, group: elements of a weight's row, scales of a row (int4).
    """
    total = tl.zeros([M, N], tl.float32)
    if FORMAT == "int4":
        for start in range(0, stride, K // 2):
            k = start + tl.arange(0, K // 2)
            mask = (k < stride)[:, None] & live[None, :]
            bits = tl.load(weight + column[None, :] * stride + k[:, None], mask=mask, other=0)
            first = (k // 32) * 64 + k % 32
            low = tl.load(x + first[None, :], mask=there & (first < size)[None, :], other=0.0)
            w = _narrow_weights(bits, scales, group, k, stride, column, live, False)
            total = tl.dot(low, w.to(low.dtype), total, input_precision="ieee")
            first += 32
            high = tl.load(x + first[None, :], mask=there & (first < size)[None, :], other=0.0)
            w = _narrow_weights(bits, scales, group, k, stride, column, live, True)
            total = tl.dot(high, w.to(high.dtype), total, input_precision="ieee")
    else:
        for start in range(0, size, K):
            k = start + tl.arange(0, K)
            mask = (k < size)[:, None] & live[None, :]
            w = tl.load(weight + column[None, :] * stride + k[:, None], mask=mask, other=0.0)
            rows = tl.load(x + k[None, :], mask=there & (k < size)[None, :], other=0.0)
            total = tl.dot(rows, w.to(rows.dtype), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, weight, scales, bias, row_scales, y, x_row, rows, outputs, size, stride, group,
    FORMAT: tl.constexpr, FP8_ROWS: tl.constexpr, BIAS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Store y [rows, outputs] = x @ weight.T + bias; a program has M rows and N outputs."""
    row = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    column = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    there, live = (row < rows)[:, None], column < outputs
    total = _accumulate(
        x + row[:, None] * x_row, there, weight, scales, column, live, size, stride, group,
        FORMAT, M, N, K,
    )  # fmt: skip
    if (FORMAT == "int8") | (FORMAT == "fp8"):
        total *= tl.load(scales + column, mask=live, other=0.0)[None, :]
    if FP8_ROWS:
        total *= tl.load(row_scales + row, mask=row < rows, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
    to = y + row[:, None] * outputs + column[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=there & live[None, :])


@triton.jit
def _rows_of_expert(starts, experts, steps, M: tl.constexpr):
    """The expert of this program's tile, its M places in the sorted order, which of them exist."""
    tile = tl.program_id(1)
    expert = request_of(tile, starts, experts, steps, M)
    start = tl.load(starts + expert)
    place = start + (tile - start // M - expert) * M + tl.arange(0, M)
    return expert.to(tl.int64), place, place < tl.load(starts + expert + 1)


@triton.jit
def expert_up(
    x, w13, scales, order, starts, hidden, x_row, experts, steps, chosen, inner, size, stride,
    group, KIND: tl.constexpr, FORMAT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Store hidden [rows * chosen, inner] = kind(gate) * up, in the order of the experts."""
    expert, place, valid = _rows_of_expert(starts, experts, steps, M)
    token = tl.load(order + place, mask=valid, other=0).to(tl.int64) // chosen
    column = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    there, live = valid[:, None], column < inner
    rows = x + token[:, None] * x_row
    first = expert * 2 * inner + column
    gate = _accumulate(
        rows, there, w13, scales, first, live, size, stride, group, FORMAT, M, N, K
    )  # fmt: skip
    up = _accumulate(
        rows, there, w13, scales, first + inner, live, size, stride, group, FORMAT, M, N, K
    )  # fmt: skip
    if (FORMAT == "int8") | (FORMAT == "fp8"):
        gate *= tl.load(scales + first, mask=live, other=0.0)[None, :]
        up *= tl.load(scales + first + inner, mask=live, other=0.0)[None, :]
    to = hidden + place.to(tl.int64)[:, None] * inner + column[None, :]
    value = activation(gate, KIND) * up
    tl.store(to, value.to(hidden.dtype.element_ty), mask=there & live[None, :])


@triton.jit
def expert_down(
    hidden, w2, scales, order, starts, gates, parts, experts, steps, outputs, size, stride, group,
    FORMAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Store parts [rows, chosen, outputs] float32 = gate * (hidden @ w2.T), by token again."""
    expert, place, valid = _rows_of_expert(starts, experts, steps, M)
    slot = tl.load(order + place, mask=valid, other=0).to(tl.int64)
    column = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    there, live = valid[:, None], column < outputs
    rows = hidden + place.to(tl.int64)[:, None] * size
    first = expert * outputs + column
    total = _accumulate(rows, there, w2, scales, first, live, size, stride, group, FORMAT, M, N, K)
    if (FORMAT == "int8") | (FORMAT == "fp8"):
        total *= tl.load(scales + first, mask=live, other=0.0)[None, :]
    total *= tl.load(gates + slot, mask=valid, other=0.0)[:, None]
    tl.store(parts + slot[:, None] * outputs + column[None, :], total, mask=there & live[None, :])


@triton.jit
def add_up(parts, y, size, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Store y [rows, size] = the sum of a row's CHOSEN parts, the most likely expert first."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, CHOSEN):
        total += tl.load(parts + (row * CHOSEN + i) * size + at, mask=at < size, other=0.0)
    tl.store(y + row * size + at, total.to(y.dtype.element_ty), mask=at < size)
