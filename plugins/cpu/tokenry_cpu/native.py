"""The native kernels: the library, and its functions with tensors for pointers.

In: tensors in host memory whose rows are contiguous. Out: new tensors. Shapes and dtypes are
checked by the ops that call this (`native_ops.py`); what crosses here is addresses.
The library is C with nothing of torch or Python in it (`csrc/api.cpp`), so one build serves every
version of both; ctypes releases the interpreter's lock while it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import weakref
from collections.abc import Iterator, Sequence
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.so")
FORMATS = {
    "float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "bfloat16_dots": 5,
}  # fmt: skip
"""bfloat16_dots: bfloat16 whose activations are rounded to bfloat16 once, summed in float32."""
KV_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class Listener(Protocol):
    """Who wants to know which kernels run on which tensors (`program.Recorder`)."""

    def linear(self, weight: Weight, x: Tensor, y: Tensor) -> None:
        """After `Weight.__call__`."""

    def rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor,
        total: Tensor | None,
    ) -> None:  # fmt: skip
        """After `rms_norm`."""

    def rope(self, q: Tensor, k: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
        """After `rope`."""

    def act_mul(self, x: Tensor, kind: int, y: Tensor) -> None:
        """After `act_mul`."""


_listener: Listener | None = None


def kv_shape(
    num_blocks: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """One layer's KV: per block and head the keys [head_dim, block_size], then the values
    [block_size, head_dim]; bfloat16 and int8: [head_dim / 2, block_size, 2] and [block_size / 2,
    head_dim, 2]; int8: after each of the two the float32 scales [block_size].
    """
    return (num_blocks, kv_heads, 2, kv_width(head_dim, dtype) * block_size)


def kv_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a key takes, and a value."""
    if dtype in (torch.float32, torch.float16):
        return head_dim
    return head_dim + head_dim % 2 + (4 if dtype == torch.int8 else 0)


def block_size_of(kv_layer: Tensor, head_dim: int) -> int:
    """Tokens of a block of such a KV."""
    return kv_layer.shape[3] // kv_width(head_dim, kv_layer.dtype)


def listener() -> Any:
    """Whom `told` named."""
    return _listener


@contextlib.contextmanager
def told(who: Listener) -> Iterator[None]:
    """Inside, `who` is told of every kernel that runs."""
    global _listener  # noqa: PLW0603 - set while one small step is recorded, at the start
    _listener = who
    try:
        yield
    finally:
        _listener = None


@functools.cache
def library() -> ctypes.CDLL:
    """The library with its functions' types. Raises OSError where it was not built."""
    lib = ctypes.CDLL(str(LIBRARY))
    p, i = c_void_p, c_int64
    for name, result, args in (
        ("tk_isa", c_char_p, ()),
        ("tk_isas", c_char_p, ()),
        ("tk_set_isa", c_int32, (c_char_p,)),
        ("tk_bf16_dots", c_int32, ()),
        ("tk_threads", None, (c_int32,)),
        ("tk_get_threads", c_int32, ()),
        ("tk_nodes", None, (p, c_int32, p)),
        ("tk_pack", p, (p, p, i, i, c_int32)),
        ("tk_adopt", p, (p, p, i, i, c_int32)),
        ("tk_packed_bytes", i, (i, i, c_int32)),
        ("tk_layout", c_int32, ()),
        ("tk_data", p, (p,)),
        ("tk_bytes", i, (p,)),
        ("tk_let_go", None, (p, i)),
        ("tk_trim", None, ()),
        ("tk_free", None, (p,)),
        ("tk_linear", None, (p, p, i, i, p, i)),
        ("tk_attention", None, (p,)),
        ("tk_rms_norm", None, (p, i, i, p, p, c_float, i, i, p, p)),
        ("tk_rope", None, (p, i, i, p, i, i, i, i, p, p, i, p, p)),
        ("tk_act_mul", None, (p, i, i, c_int32, p)),
        ("tk_run", None, (p, p)),
        ("tk_pass_rows", i, ()),
        ("tk_sample", None, (p, i, i, p, p, p, p, p, p, p)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, args
    return lib


def built() -> bool:
    """Whether the library is there."""
    return LIBRARY.exists()


def isa() -> str:
    """The instruction set whose kernels run."""
    return str(library().tk_isa().decode())


def isas() -> tuple[str, ...]:
    """Those that this machine can run, best first."""
    return tuple(library().tk_isas().decode().split())


def standins() -> tuple[str, ...]:
    """Kernels of instructions that this machine may lack, carried out in C++: for tests, slow."""
    names = library().tk_standins
    names.restype = c_char_p
    return tuple(names().decode().split())


def set_isa(name: str) -> bool:
    """Run the kernels of that instruction set from now on; False if there are none to run."""
    return bool(library().tk_set_isa(name.encode()))


def bf16_dots() -> bool:
    """Whether products of bfloat16 pairs are one instruction of the kernels that run."""
    return bool(library().tk_bf16_dots())


def set_threads(count: int) -> None:
    """Threads of one kernel, the caller's among them."""
    library().tk_threads(count)


def threads() -> int:
    """As they were set."""
    return int(library().tk_get_threads())


def narrowest(weight: Tensor) -> Tensor:
    """The same values in 16 bits where they fit, else in float32."""
    if weight.dtype in {torch.bfloat16, torch.float16}:
        return weight
    wide = weight.float()
    for dtype in (torch.bfloat16, torch.float16):
        few = wide[:16]  # most that do not fit are found out here
        if torch.equal(few.to(dtype).float(), few):
            narrow = wide.to(dtype)
            pairs = zip(torch.split(narrow, 512), torch.split(wide, 512), strict=True)
            if all(torch.equal(a.float(), b) for a, b in pairs):
                return narrow
    return wide


def name_of(dtype: torch.dtype) -> str:
    """As FORMATS and the core name it."""
    return str(dtype).removeprefix("torch.")


def layout() -> int:
    """The version of the packed formats."""
    return int(library().tk_layout())


def packed_bytes(n: int, k: int, format: str) -> int:
    """Bytes of a packed weight [n, k]."""
    return int(library().tk_packed_bytes(n, k, FORMATS[format]))


def set_nodes(nodes: Sequence[Sequence[int]]) -> None:
    """The CPUs of each memory node, for threads that start later: each stays on one node."""
    cpus = [cpu for node in nodes for cpu in node]
    counts = (c_int32 * len(nodes))(*map(len, nodes))
    library().tk_nodes(counts, len(nodes), (c_int32 * len(cpus))(*cpus))


class Weight:
    """A packed weight in memory of its own. format: a key of FORMATS."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        format: str,
        *,
        memory: mmap.mmap | None = None,
        offset: int = 0,
    ) -> None:
        """Packs weight [n, k]: float32, or 16-bit for the 16-bit formats. With `memory` it is there
        already, packed, `offset` bytes from the begin. Raises MemoryError.
        """
        self.out_features, self.in_features = weight.shape
        self.format = format
        self._bias = None if bias is None else bias.float().contiguous()
        bias_at = None if self._bias is None else self._bias.data_ptr()
        size = (self.out_features, self.in_features, FORMATS[format])
        lib = library()
        if memory is None:
            source = weight.contiguous()
            self.handle = lib.tk_pack(source.data_ptr(), bias_at, *size)
        else:
            held = torch.frombuffer(memory, dtype=torch.uint8, offset=offset)
            self._held = held  # keeps the memory as long as this weight
            self.handle = lib.tk_adopt(held.data_ptr(), bias_at, *size)
        if not self.handle:
            raise MemoryError(f"no memory to pack a weight of {tuple(weight.shape)} as {format}")
        self.nbytes: int = lib.tk_bytes(self.handle)
        weakref.finalize(self, lib.tk_free, self.handle)

    def memory(self) -> memoryview:
        """The packed values and scales."""
        raw = (ctypes.c_char * self.nbytes).from_address(library().tk_data(self.handle))
        return memoryview(raw)

    def __call__(self, x: Tensor) -> Tensor:
        """X [T, in] float32 with contiguous rows -> [T, out]."""
        rows = x.shape[0]
        y = torch.empty((rows, self.out_features))
        library().tk_linear(
            self.handle, x.data_ptr(), x.stride(0), rows, y.data_ptr(), self.out_features
        )
        if _listener is not None:
            _listener.linear(self, x, y)
        return y


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """X [..., size] float32, contiguous in all but the first dimension; residual like x."""
    size = x.shape[-1]
    y = torch.empty(x.shape)
    total = None if residual is None else torch.empty(x.shape)
    rows = y.numel() // size
    inner = 1 if x.dim() < 3 else x.shape[1]
    library().tk_rms_norm(
        x.data_ptr(),
        x.stride(0) if x.dim() > 1 else size,
        inner,
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        eps,
        rows,
        size,
        y.data_ptr(),
        None if total is None else total.data_ptr(),
    )
    if _listener is not None:
        _listener.rms_norm(x, residual, weight, eps, y, total)
    return y, total


def rope(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Q [T, H, D], k [T, KH, D] float32, contiguous in all but the first dimension; positions [T]
    int32.
    """
    q_out, k_out = torch.empty(q.shape), torch.empty(k.shape)
    library().tk_rope(
        q.data_ptr(),
        q.stride(0),
        q.shape[1],
        k.data_ptr(),
        k.stride(0),
        k.shape[1],
        q.shape[0],
        q.shape[2],
        positions.data_ptr(),
        table.data_ptr(),
        table.shape[2],
        q_out.data_ptr(),
        k_out.data_ptr(),
    )
    if _listener is not None:
        _listener.rope(q, k, table, (q_out, k_out))
    return q_out, k_out


def act_mul(x: Tensor, kind: str) -> Tensor:
    """X [T, 2I] float32 contiguous -> [T, I]."""
    rows, size = x.shape[0], x.shape[1] // 2
    y = torch.empty((rows, size))
    library().tk_act_mul(x.data_ptr(), rows, size, ACTIVATIONS[kind], y.data_ptr())
    if _listener is not None:
        _listener.act_mul(x, ACTIVATIONS[kind], y)
    return y


def attention(call: Any) -> None:
    """Run an abi.AttentionCall."""
    library().tk_attention(ctypes.byref(call))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of logits [R, V] float32 contiguous, per row float32 (top_k int32): ids [R] int32, and [R]
    uint8, 1 where the row's largest logit is infinite or one of it NaN.
    """
    rows, size = logits.shape
    ids, broken = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.uint8)
    per_row = (temperature, top_k, top_p, min_p, uniform)
    library().tk_sample(
        logits.data_ptr(), rows, size, *(t.data_ptr() for t in per_row), ids.data_ptr(),
        broken.data_ptr(),
    )  # fmt: skip
    return ids, broken


def rows_of_a_pass() -> int:
    """Rows that a program takes at a time from one attention to the next (csrc/program.h)."""
    return int(library().tk_pass_rows())


def run(program: Any, step: Any) -> None:
    """Run a abi.ProgramCall on an abi.StepCall."""
    library().tk_run(ctypes.byref(program), ctypes.byref(step))
