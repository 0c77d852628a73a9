"""The structs of csrc/kernels.h and csrc/program.h, field by field; pointers as integers."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class AttentionCall(ctypes.Structure):
    """`struct Attention` of csrc/kernels.h; pointers as integers, strides in floats."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_void_p) for name in ("kv", "out")),
        *(
            (name, c_void_p)
            for name in ("q_start", "q_lens", "seq_lens", "block_table", "slots")
        ),
        *(
            (name, c_int64)
            for name in (
                "tokens", "requests", "table_width", "heads", "kv_heads", "head_dim", "block_size",
            )
        ),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
        ("format", c_int32),
    )  # fmt: skip


class Operand(ctypes.Structure):
    """`struct Operand`."""

    _fields_ = (("buffer", c_int32), ("offset", c_int32))


class Instruction(ctypes.Structure):
    """`struct Instruction`."""

    _fields_ = (
        ("op", c_int32),
        ("rows", c_int32),
        ("inputs", Operand * 3),
        ("outputs", Operand * 2),
        ("weight", c_void_p),
        ("vector", c_void_p),
        ("scalar", c_float),
        ("scalar1", c_float),
        *((f"n{i}", c_int64) for i in range(5)),
    )


class Buffer(ctypes.Structure):
    """`struct Buffer`."""

    _fields_ = (("width", c_int64), ("place", c_int64), ("passing", c_int64))


class ProgramCall(ctypes.Structure):
    """`struct Program`."""

    _fields_ = (
        ("instructions", c_void_p),
        ("count", c_int64),
        ("buffers", c_void_p),
        ("lasting", c_int64),
    )


class StepCall(ctypes.Structure):
    """`struct Step`."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "token_ids", "positions", "logit_rows", "q_start", "q_lens", "seq_lens",
                "block_table", "slots",
            )
        ),
        *(
            (name, c_int64)
            for name in (
                "tokens", "requests", "rows", "table_width", "block_size", "share", "passing",
            )
        ),
        ("kv", c_void_p),
        ("kv_format", c_int32),
        ("arena", c_void_p),
        ("out", c_void_p),
    )  # fmt: skip
