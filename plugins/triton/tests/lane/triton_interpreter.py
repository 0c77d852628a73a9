"""Triton kernels run by Triton's interpreter on the host, with its arithmetic put right.

The interpreter of triton 3.6 keeps bfloat16 values as their 16-bit patterns and computes on those
patterns (sums, products, comparisons, dots), and it truncates where a device rounds. `install`
widens bfloat16 to float32 before each operation and rounds to nearest even after it. Narrowing to
float8 is wrong where rounding carries into the exponent (0.484 becomes 0.25): `install` has torch
do it, clamp as devices do, and widen, and teaches it the float8 of gfx94x (e4m3fnuz), of which it
knows the name only. It also lets a loaded scalar be a loop bound under numpy 2.4.

For tests only. TRITON_INTERPRET=1 must be in the environment before triton is imported first.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits):
    """float32 values of bfloat16 patterns (uint16)."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def narrow(values):
    """bfloat16 patterns of float32 values, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(method):
    """A builder method over handles and a numpy function, with bfloat16 handles widened."""

    def call(self, *args):
        handles, function = args[:-1], args[-1]
        if not any(map(_is_bf16, handles)):
            return method(self, *args)
        out = method(self, *map(_wide, handles), function)
        if out.data.dtype == bool:
            return out
        return TensorHandle(narrow(out.data), tl.bfloat16)

    return call


FLOAT8 = {
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}  # fmt: skip


def _is_f32(handle):
    return handle.dtype.scalar == tl.float32


def _narrow_to_float8(values, dtype):
    most = torch.finfo(dtype).max
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-most, most)
    return wide.to(dtype).view(torch.uint8).numpy().reshape(np.shape(values))


def _widen_float8(bits, dtype):
    raw = torch.from_numpy(np.ascontiguousarray(bits, dtype=np.uint8)).view(dtype)
    return raw.float().numpy().reshape(np.shape(bits))


def _wide8(handle):
    kind = FLOAT8.get(handle.dtype.scalar)
    return TensorHandle(_widen_float8(handle.data, kind), tl.float32) if kind else handle


def _casts(cast, fp_to_fp):
    def cast_impl(self, source, to):
        source = _wide(source)
        if to.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return source if source.dtype.scalar == to.scalar else cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if source.dtype.scalar in FLOAT8:
            wide = _wide8(source)
            return wide if to.scalar == tl.float32 else create_fp_to_fp(self, wide, to, rounding)
        if to.scalar in FLOAT8:
            exact = fp_to_fp(self, source, tl.float32, None) if not _is_f32(source) else source
            return TensorHandle(_narrow_to_float8(exact.data, FLOAT8[to.scalar]), to.scalar)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return fp_to_fp(self, source, to, rounding)

    return cast_impl, create_fp_to_fp


def _dots(dot):
    """Summed in float64: numpy's float32 product of a row depends on where the row lies, a device's
    does not.
    """

    def create_dot(self, a, b, accumulator, *rest):
        a, b = _wide(_wide8(a)), _wide(_wide8(b))
        if not (a.dtype.scalar.is_standard_floating() and b.dtype.scalar.is_standard_floating()):
            return dot(self, a, b, accumulator, *rest)
        total = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + accumulator.data
        return TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)

    return create_dot


def _reductions(apply):
    """The result stays float32: a device promotes bfloat16 before it reduces, too."""

    def apply_impl(self, given):
        parts = given if isinstance(given, tuple) else (given,)
        if not any(p.dtype.scalar == tl.bfloat16 for p in parts):
            return apply(self, given)
        wide = tuple(
            self.to_tensor(widen(p.handle.data), tl.float32)
            if p.dtype.scalar == tl.bfloat16 else p
            for p in parts
        )  # fmt: skip
        return apply(self, wide if isinstance(given, tuple) else wide[0])

    return apply_impl


def _indices(patch):
    """Tensors that `range` takes: numpy 2.4 refuses an array of one element as a scalar."""

    def patched(tensor, *scope):
        result = patch(tensor, *scope)

        def index(self):
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    return patched


def _types(patch):
    """`to_ir` with e4m3fnuz."""

    def patched(lang, scope):
        patch(lang, scope)
        to_ir = lang.dtype.to_ir

        def convert(self, builder):
            return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, builder)

        scope.set_attr(lang.dtype, "to_ir", convert)

    return patched


def install():
    """Put the interpreter of this process right, once."""
    if getattr(InterpreterBuilder, "put_right", False):
        return
    for name in ("binary_op", "unary_op", "ternary_op"):
        if hasattr(InterpreterBuilder, name):
            setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = _casts(
        InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    )
    InterpreterBuilder.create_dot = _dots(InterpreterBuilder.create_dot)
    reductions = interpreter.ReduceOps
    reductions.apply_impl = _reductions(reductions.apply_impl)
    interpreter._patch_lang_tensor = _indices(interpreter._patch_lang_tensor)
    interpreter._patch_lang_core = _types(interpreter._patch_lang_core)
    InterpreterBuilder.put_right = True
