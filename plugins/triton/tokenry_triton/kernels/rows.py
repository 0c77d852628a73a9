"""Kernels that take rows one by one: RMS norm, rotary embedding, gated activation.

float32 inside, whatever the dtype of the rows. A row's bits depend on that row alone.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, residual, weight, y, total,
    x_row, x_head, r_row, r_head, heads, size, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store y = (x + residual) / rms * weight, total = x + residual; one program a row of `size`.

    Row i of the grid is head i % heads of token i // heads; y and total are contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    token, head = row // heads, row % heads
    value = tl.load(x + token * x_row + head * x_head + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        more = tl.load(residual + token * r_row + head * r_head + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(total + row * size + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (wide * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rope(
    q, k, q_out, k_out, positions, table,
    q_row, k_row, q_head, k_head, q_heads, k_heads,
    HALF: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotated copies of q and k; one program a token and HEADS of its q and k heads together.

    table [positions, 2, HALF] float32; dims 2 * HALF .. DIM are copied. Outputs are contiguous.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF_BLOCK)
    angle = tl.load(positions + token).to(tl.int64) * 2 * HALF + at
    cos = tl.load(table + angle, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(table + angle + HALF, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
    _turn(
        q + token * q_row, q_out + token * q_heads * DIM, q_head, q_heads, head, cos, sin,
        HALF, DIM, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip
    _turn(
        k + token * k_row, k_out + token * k_heads * DIM, k_head, k_heads, head, cos, sin,
        HALF, DIM, HALF_BLOCK, REST_BLOCK,
    )  # fmt: skip


@triton.jit
def _turn(
    x, out, x_head, heads, head, cos, sin,
    HALF: tl.constexpr, DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, HALF_BLOCK)[None, :]
    mine = head[:, None] < heads
    inside = mine & (at < HALF)
    first = tl.load(x + head[:, None] * x_head + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + head[:, None] * x_head + HALF + at, mask=inside, other=0.0).to(tl.float32)
    to = out + head[:, None] * DIM + at
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)
    if 2 * HALF < DIM:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        left = mine & (rest < DIM)
        kept = tl.load(x + head[:, None] * x_head + rest, mask=left, other=0.0)
        tl.store(out + head[:, None] * DIM + rest, kept, mask=left)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """silu, gelu or gelu_tanh of float32 values; tanh by exp of what is at most 0, so that no value
    overflows.
    """
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def tanh(x):
    """By exp(-2 |x|), which never overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def act_mul(x, y, x_row, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Store y [T, size] = kind(x[:, :size]) * x[:, size:]; a program a row and a block."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_row + size + at, mask=inside, other=0.0).to(tl.float32)
    value = activation(gate, KIND) * up
    tl.store(y + row * size + at, value.to(y.dtype.element_ty), mask=inside)
