"""A step that holds the memory of a step and computes little of it, for planning memory.

In: a recorded program. Out: the shortened program. The layers of a model need the same scratch one
after the other, so each kind of instruction runs once; a linear multiplies all rows, but by few
outputs. What the left-out instructions would have written is touched by the caller instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from tokenry_cpu import native
from tokenry_cpu.abi import Instruction, ProgramCall

PANEL = 32
"""Outputs that one thread takes at a time (`kPanel`)."""


class Rehearsal:
    """The instructions to run; holds the small weights that they name."""

    def __init__(self, noted: Sequence[Any], instructions: Any, whole: ProgramCall) -> None:
        """noted: `program.Noted`, of which `instructions` is the encoded form, `whole` the call."""
        self._held: list[native.Weight] = []
        few: dict[Any, Instruction] = {}
        for one, instruction in zip(noted, instructions, strict=True):
            kind = _kind(one)
            if kind not in few:
                few[kind] = self._cheap(one.weight, instruction)
        self._instructions = (Instruction * len(few))(*few.values())
        self.call = ProgramCall(
            ctypes.addressof(self._instructions), len(few), whole.buffers, whole.lasting
        )

    def _cheap(self, weight: native.Weight | None, instruction: Instruction) -> Instruction:
        """The instruction, with few outputs for each thread where it is a linear."""
        cheap = Instruction.from_buffer_copy(instruction)
        if weight is not None:
            outputs = min(weight.out_features, PANEL * native.threads())
            dtype = getattr(torch, weight.format.removesuffix("_dots"), torch.float32)
            wide = torch.float32 if weight.format in {"int8", "int4"} else dtype
            zeros = torch.zeros((outputs, weight.in_features), dtype=wide)
            small = native.Weight(zeros, None, weight.format)
            self._held.append(small)
            cheap.weight = small.handle
        return cheap


def _kind(one: Any) -> Any:
    """What two instructions must share to need the same scratch: all but the layer, the values of
    vectors and weights, and scalars.
    """
    shapes = [None if t is None else tuple(t.shape) for t in (*one.inputs, *one.outputs)]
    values = tuple(v for i, v in enumerate(one.values) if i != 3)  # 3: the layer of attention
    weight = one.weight and (one.weight.out_features, one.weight.in_features, one.weight.format)
    return one.op, tuple(shapes), values, weight
