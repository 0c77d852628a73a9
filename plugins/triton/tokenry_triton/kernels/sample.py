"""Drawing a token of each row without sorting it: one program a row.

Weights w = exp((logit - largest) / temperature) lie in [0, 1], where float32 bits order as integers
do. What is the smallest bit pattern v such that less than `target` of the row's mass (or number)
lies above v? That is found four bits at a time, eight walks over the row; top_k is the question for
the number, top_p for the mass. Of those equal to v the lower ids are kept. All sums go from the
first block to the last, so a row's token depends on that row alone.
"""

import triton
import triton.language as tl


@triton.jit
def _weights(row, at, size, top, temperature):
    """The weights of a block; a NaN or -inf is never drawn."""
    x = tl.load(row + at, mask=at < size, other=float("-inf"))
    w = tl.exp((x - top) / temperature)
    return tl.where((at < size) & (x > float("-inf")), w, 0.0)


@triton.jit
def _above(row, size, top, temperature, low, shift, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """[16]: number or mass above the last pattern of each of 16 buckets of 2 ** shift from low."""
    ends = low + ((tl.arange(0, 16) + 1) << shift) - 1
    found = tl.zeros([16], tl.float32)
    for start in range(0, size, BLOCK):
        w = _weights(row, start + tl.arange(0, BLOCK), size, top, temperature)
        over = w.to(tl.int32, bitcast=True)[None, :] > ends[:, None]
        part = w[None, :] if BY_MASS else tl.full([1, BLOCK], 1.0, tl.float32)
        found += tl.sum(tl.where(over, part, 0.0), 1)
    return found


@triton.jit
def _border(row, size, top, temperature, target, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest pattern above which less than `target` lies."""
    low = tl.zeros([], tl.int32)
    for i in range(0, 8):
        shift = tl.maximum(26 - 4 * i, 0)  # 1.0, the largest weight, is below 2 ** 30
        above = _above(row, size, top, temperature, low, shift, BY_MASS, BLOCK)
        bucket = tl.sum(tl.where(above >= target, 1, 0), 0)
        low += tl.minimum(bucket, 15) << shift
    return low


@triton.jit
def _over(row, size, top, temperature, pattern, BLOCK: tl.constexpr):
    """Number and mass of what lies above a pattern."""
    number = tl.zeros([], tl.float32)
    mass = tl.zeros([], tl.float32)
    for start in range(0, size, BLOCK):
        w = _weights(row, start + tl.arange(0, BLOCK), size, top, temperature)
        over = w.to(tl.int32, bitcast=True) > pattern
        number += tl.sum(tl.where(over, 1.0, 0.0), 0)
        mass += tl.sum(tl.where(over, w, 0.0), 0)
    return number, mass


@triton.jit
def _kept(w, pattern, equals, before):
    """Which of a block's weights a border leaves: all above it, and of its equals the first; and
    how many equals there were.
    """
    bits = w.to(tl.int32, bitcast=True)
    same = bits == pattern
    rank = before + tl.cumsum(same.to(tl.int32), 0)
    return (bits > pattern) | (same & (rank <= equals)), before + tl.sum(same.to(tl.int32), 0)


@triton.jit
def greedy(logits, ids, logits_row, size, BLOCK: tl.constexpr):
    """The largest logit's id, of equals the lowest."""
    row = tl.program_id(0).to(tl.int64)
    best, _ = largest(logits + row * logits_row, size, BLOCK)
    tl.store(ids + row, best)


@triton.jit
def largest(row, size, BLOCK: tl.constexpr):
    """Id and value of the largest, of equals the lowest id; NaN is never the largest."""
    best = tl.zeros([], tl.int32)
    top = tl.full([], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < size, other=float("-inf"))
        x = tl.where(x > float("-inf"), x, float("-inf"))
        value = tl.max(x, 0)
        first = tl.min(tl.where(x == value, at, size), 0)
        best = tl.where(value > top, first, best)
        top = tl.maximum(top, value)
    return best, top


@triton.jit
def sample(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, ids, logits_row, size,
    FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids [R] of logits [R, size]: temperature, top_k, top_p of what it left, min_p, then the
    inverse of the cumulative distribution in id order.
    """
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * logits_row
    best, top = largest(row, size, BLOCK)
    temperature = tl.load(temperatures + number)
    if (temperature > 0) & (top > float("-inf")):
        pattern = tl.zeros([], tl.int32)
        equals = tl.zeros([], tl.int32) + size
        least = tl.zeros([], tl.float32)
        if FILTER:
            least = tl.load(min_ps + number)
            top_k = tl.load(top_ks + number)
            top_p = tl.load(top_ps + number)
            if (top_k > 0) & (top_k < size):
                k = top_k.to(tl.float32)
                pattern = _border(row, size, top, temperature, k, False, BLOCK)
                over, _ = _over(row, size, top, temperature, pattern, BLOCK)
                equals = (k - over).to(tl.int32)
            if top_p < 1:
                _, mass = _over(row, size, top, temperature, pattern, BLOCK)
                mass += tl.minimum(equals, size).to(tl.float32) * pattern.to(
                    tl.float32, bitcast=True
                )
                target = top_p * mass
                border = _border(row, size, top, temperature, target, True, BLOCK)
                _, over = _over(row, size, top, temperature, border, BLOCK)
                value = tl.maximum(border.to(tl.float32, bitcast=True), 1e-38)
                covering = tl.minimum(tl.ceil((target - over) / value), size).to(tl.int32)
                covering = tl.maximum(covering, 1)
                higher = border > pattern
                same = border == pattern
                equals = tl.where(
                    higher, covering, tl.where(same, tl.minimum(equals, covering), equals)
                )
                pattern = tl.maximum(border, pattern)
        best = _draw(
            row, size, top, temperature, pattern, equals, least, tl.load(uniforms + number), best,
            BLOCK,
        )  # fmt: skip
    tl.store(ids + number, best)


@triton.jit
def _draw(row, size, top, temperature, pattern, equals, least, uniform, best, BLOCK: tl.constexpr):
    """The id at which the mass of what is kept exceeds uniform * total."""
    total = tl.zeros([], tl.float32)
    seen = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        w = _weights(row, start + tl.arange(0, BLOCK), size, top, temperature)
        keep, seen = _kept(w, pattern, equals, seen)
        total += tl.sum(tl.where(keep & (w >= least), w, 0.0), 0)
    target = uniform * total
    before = tl.zeros([], tl.float32)
    seen = tl.zeros([], tl.int32)
    drawn = tl.zeros([], tl.int32) + size
    last = best
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = _weights(row, at, size, top, temperature)
        keep, seen = _kept(w, pattern, equals, seen)
        w = tl.where(keep & (w >= least), w, 0.0)
        reached = (before + tl.cumsum(w, 0) > target) & (w > 0)
        drawn = tl.minimum(drawn, tl.min(tl.where(reached, at, size), 0))
        last = tl.where(tl.max(w, 0) > 0, tl.max(tl.where(w > 0, at, 0), 0), last)
        before += tl.sum(w, 0)
    return tl.where(drawn < size, drawn, last)
