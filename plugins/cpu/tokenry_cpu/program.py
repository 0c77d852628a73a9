"""A step as one native call: the ops of a small step are recorded once and replayed for any step.

Between two kernels of a small model Python costs as much as the kernels. What a decoder does to its
tensors is the same in every step, only the number of rows differs; so the step function is run
once on a few tokens while each native kernel and each plain torch operation is noted, and what was
noted becomes a list of instructions (`csrc/program.h`) that `tk_run` works through, with the
intermediate tensors in one piece of memory whose places are planned here.

A step that does anything else (an expert's rows are chosen by value, a layer norm) is not recorded:
it goes on as Python. Before a program is used it is run on the recorded step, and must give its
logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tokenry.backend.base import KV, StepBatch, StepFn
from tokenry.backend.contract import Bucket
from tokenry_cpu import native
from tokenry_cpu.abi import Buffer, Instruction, Operand, ProgramCall, StepCall
from tokenry_cpu.rehearsal import Rehearsal

EMBED, ADD, MUL, DIV, TANH, GATHER, LINEAR, RMS_NORM, ROPE, ACT_MUL, ATTEND = range(11)
TOKENS, REQUESTS = 5, 2
"""Of the recorded step: 4 new tokens of one request and 1 of another, so that a tensor's rows tell
whether there is one for each token or one for each row of logits.
"""


class Unfit(Exception):
    """The step does something that a program cannot."""


@dataclass(frozen=True, slots=True)
class Noted:
    """One instruction with tensors for operands."""

    op: int
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    values: Sequence[int] = ()
    scalars: Sequence[float] = ()
    vector: Tensor | None = None
    weight: native.Weight | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a step does. Tensors are told apart by the memory they share."""

    def __init__(self, batch: StepBatch, kv: KV) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.noted: list[Noted] = []
        self._layers = {layer.data_ptr(): i for i, layer in enumerate(kv)}
        self._ids = {_memory(batch.token_ids): 0, _memory(batch.positions): 1}
        self._rows = {_memory(batch.logit_rows)}
        self.block_size = 0
        self._alive: list[Any] = []  # an address must not be used again while recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch: true would import its compiler (1 to 2 s) for the first operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive.append((args, out))
        name = str(func)
        if name.startswith(FRESH) or _is_view(func, args, out):
            return out
        if name in CASTS and _memory(args[0]) in self._rows:
            self._rows.add(_memory(out))
        elif name == "aten.embedding.default" and _memory(args[1]) in self._ids:
            which = self._ids[_memory(args[1])]
            table = native.narrowest(args[0])
            values = (out.shape[1], which, native.FORMATS[native.name_of(table.dtype)])
            self._note(EMBED, [], [out], values, vector=table)
        elif name == "aten.index.Tensor" and _memory(args[1][0]) in self._rows:
            self._note(GATHER, [args[0]], [out])
        elif name == "aten.add.Tensor" and isinstance(args[1], Tensor) and not kwargs:
            if args[0].shape != args[1].shape:
                raise Unfit(name)
            self._note(ADD, args[:2], [out])
        elif name in SCALAR_OPS and isinstance(args[1], float | int):
            self._note(SCALAR_OPS[name], args[:1], [out], scalars=[float(args[1])])
        elif name == "aten.tanh.default":
            self._note(TANH, args[:1], [out])
        else:
            raise Unfit(name)
        return out

    def _note(self, op: int, inputs: Sequence[Any], outputs: Sequence[Any], *a: Any, **k: Any):  # type: ignore[no-untyped-def]
        for tensor in (*inputs, *outputs):
            if tensor is not None and tensor.dtype != torch.float32:
                raise Unfit(f"{tensor.dtype}")
        self.noted.append(Noted(op, inputs, outputs, *a, **k))

    # ---- the native kernels, as native.py tells of them ----

    def linear(self, weight: native.Weight, x: Tensor, y: Tensor) -> None:
        """Y = x W^T."""
        self._note(LINEAR, [x], [y], weight=weight)

    def rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor,
        total: Tensor | None,
    ) -> None:  # fmt: skip
        """Y, total = norm."""
        inner = 1 if x.dim() < 3 else x.shape[1]
        self._alive.append(weight)
        outputs = [y] if total is None else [y, total]
        values = (x.shape[-1], inner)
        self._note(RMS_NORM, [x, residual], outputs, values, [eps], vector=weight)

    def rope(self, q: Tensor, k: Tensor, table: Tensor, out: Sequence[Tensor]) -> None:
        """Out = q, k turned."""
        values = (q.shape[1], k.shape[1], q.shape[2], table.shape[2])
        self._note(ROPE, [q, k], out, values, vector=table)

    def act_mul(self, x: Tensor, kind: int, y: Tensor) -> None:
        """Y = act(gate) * up."""
        self._note(ACT_MUL, [x], [y], (y.shape[1], kind))

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, out: Tensor,
        *, scale: float, softcap: float, window: int,
    ) -> None:  # fmt: skip
        """Out = attention."""
        layer = self._layers.get(kv_layer.data_ptr())
        if layer is None:
            raise Unfit("attention over something else than its layer")
        self.block_size = native.block_size_of(kv_layer, q.shape[2])
        values = (q.shape[1], k.shape[1], q.shape[2], layer, window)
        self._note(ATTEND, [q, k, v], [out], values, [scale, softcap])


FRESH = ("aten.empty.", "aten.zeros.")
CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.long.default"}
SCALAR_OPS = {"aten.mul.Tensor": MUL, "aten.div.Tensor": DIV}


def _is_view(func: Any, args: Any, out: Any) -> bool:
    """Whether all that came out is the memory that went in, unchanged."""
    if func._schema.is_mutable or not isinstance(args[0], Tensor):
        return False
    outs = out if isinstance(out, list | tuple) else (out,)
    return all(isinstance(t, Tensor) and _memory(t) == _memory(args[0]) for t in outs)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Program:
    """What was recorded, ready to run. Owned by one step function; not for two threads at once."""

    def __init__(self, noted: Sequence[Noted], result: Tensor, block_size: int) -> None:
        """Plans the buffers. Raises Unfit where a tensor is not rows of one."""
        self._noted = noted  # keeps weights and vectors alive
        self._block_size = block_size
        owners = [
            (_memory(t), t.untyped_storage().nbytes() // 4, _rows_of(t))
            for one in noted
            for t in one.outputs
        ]
        self._index: dict[int, int] = {}
        kinds: list[int] = []
        widths: list[int] = []
        for memory, size, rows in owners:
            if memory not in self._index:
                self._index[memory] = len(widths)
                kinds.append(rows)
                widths.append(size // (TOKENS if rows == 0 else REQUESTS))
        self._output = self._index[_memory(result)]
        if result.storage_offset() or result.shape[1] != widths[self._output]:
            raise Unfit("the logits are a part of something")
        self._vocab = result.shape[1]
        lives = _lives(noted, self._index)
        del lives[self._output]
        passes = _passes(noted)
        passing = {
            buffer
            for buffer, (first, last) in lives.items()
            if passes[first] is not None and passes[first] == passes[last]
        }
        lasting, self._lasting = _place({b: lives[b] for b in lives if b not in passing}, widths)
        passed, self._passing = _place({b: lives[b] for b in passing}, widths)
        places = {self._output: -1} | lasting | passed
        self._buffers = (Buffer * len(widths))(
            *(Buffer(w, places[i], i in passing) for i, w in enumerate(widths))
        )
        self._instructions = (Instruction * len(noted))(*(self._encode(n, widths) for n in noted))
        self._call = ProgramCall(
            ctypes.addressof(self._instructions),
            len(noted),
            ctypes.addressof(self._buffers),
            self._lasting,
        )
        self._arena = torch.empty(0)
        self._pass_rows = native.rows_of_a_pass()
        self._kv: KV = None
        self._layers: Any = None
        self._kv_format = 0

    def _encode(self, one: Noted, widths: Sequence[int]) -> Instruction:
        def operand(tensor: Tensor | None) -> Operand:
            if tensor is None:
                return Operand(-1, 0)
            buffer = self._index.get(_memory(tensor))
            if buffer is None:
                raise Unfit("a tensor from outside of the step")
            if tensor.stride(0) != widths[buffer] or not _inner_contiguous(tensor):
                raise Unfit("a tensor that is not rows of one buffer")
            return Operand(buffer, tensor.storage_offset())

        inputs = [operand(t) for t in one.inputs]
        inputs += [Operand(-1, 0)] * (3 - len(inputs))
        outputs = [operand(t) for t in one.outputs]
        outputs += [Operand(-1, 0)] * (2 - len(outputs))
        scalars = [*one.scalars, 0.0, 0.0]
        instruction = Instruction(
            one.op,
            _rows_of(one.outputs[0]),
            (Operand * 3)(*inputs),
            (Operand * 2)(*outputs),
            None if one.weight is None else one.weight.handle,
            None if one.vector is None else one.vector.data_ptr(),
            scalars[0],
            scalars[1],
            *(*one.values, 0, 0, 0, 0, 0)[:5],
        )
        if one.op == RMS_NORM and one.inputs[1] is not None and not one.inputs[1].is_contiguous():
            raise Unfit("a residual that is a part of something")
        return instruction

    def __call__(self, batch: StepBatch, kv: KV) -> Tensor:
        """The step: logits [R, vocab]."""
        return self._run(self._call, batch, kv)

    def rehearse(self, batch: StepBatch, kv: KV) -> Tensor:
        """Logits of the step's shape that mean nothing, no two of a row the same (to draw from
        thousands of equals takes long); the step's memory was held meanwhile.
        """
        _, _, need = self._room(batch)
        self._arena[:need].zero_()
        rehearsal = Rehearsal(self._noted, self._instructions, self._call)
        return self._run(rehearsal.call, batch, kv).copy_(torch.linspace(0, -16, self._vocab))

    def _room(self, batch: StepBatch) -> tuple[int, int, int]:
        """Rows that a lasting and a passing buffer have room for, and the floats of all, which the
        arena has.
        """
        share = max(batch.token_ids.shape[0], batch.logit_rows.shape[0])
        passing = min(share, self._pass_rows)
        need = share * self._lasting + passing * self._passing
        if self._arena.numel() < need:
            self._arena = torch.empty(need)
        return share, passing, need

    def _run(self, call: ProgramCall, batch: StepBatch, kv: KV) -> Tensor:
        tokens, rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        share, passing, _ = self._room(batch)
        if self._kv is not kv:
            self._kv = kv
            self._layers = (c_void_p * len(kv))(*(layer.data_ptr() for layer in kv))
            self._kv_format = native.KV_FORMATS[kv[0].dtype]
        out = torch.empty((rows, self._vocab))
        step = StepCall(
            batch.token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.logit_rows.data_ptr(),
            batch.q_start.data_ptr(),
            batch.q_lens.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.block_table.data_ptr(),
            batch.slots.data_ptr(),
            tokens,
            batch.q_lens.shape[0],
            rows,
            batch.block_table.shape[1],
            self._block_size,
            share,
            passing,
            ctypes.addressof(self._layers),
            self._kv_format,
            self._arena.data_ptr(),
            out.data_ptr(),
        )
        native.run(call, step)
        return out


def _rows_of(tensor: Tensor) -> int:
    """0: a row for each token, 1: one for each row of logits."""
    if tensor.shape[0] not in (TOKENS, REQUESTS):
        raise Unfit(f"a tensor of {tensor.shape[0]} rows")
    return 0 if tensor.shape[0] == TOKENS else 1


def _inner_contiguous(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _lives(noted: Sequence[Noted], index: dict[int, int]) -> dict[int, tuple[int, int]]:
    """The first and the last instruction that each buffer is needed by."""
    lives: dict[int, tuple[int, int]] = {}
    for i, one in enumerate(noted):
        for tensor in (*one.inputs, *one.outputs):
            buffer = None if tensor is None else index.get(_memory(tensor))
            if buffer is not None:
                lives[buffer] = lives.get(buffer, (i, i))[0], i
    return lives


def _passes(noted: Sequence[Noted]) -> list[int | None]:
    """Of each instruction the number of its pass; None if it looks at all rows (`by_rows` of
    csrc/program.cpp).
    """
    number, passes = 0, []
    for one in noted:
        whole = _is_whole(one)
        number += whole
        passes.append(None if whole else number)
    return passes


def _is_whole(one: Noted) -> bool:
    return one.op in (ATTEND, GATHER) or _rows_of(one.outputs[0]) != 0


def _place(lives: dict[int, tuple[int, int]], widths: Sequence[int]) -> tuple[dict[int, int], int]:
    """Each buffer's place in a row's share of the arena, and the size of that share: a buffer takes
    the first gap among those that live at the same time.
    """
    places: dict[int, int] = {}

    def end(buffer: int) -> int:
        return places[buffer] - -widths[buffer] // 16 * 16  # whole cache lines

    for buffer in sorted(lives, key=lambda b: lives[b][0]):
        first, last = lives[buffer]
        rivals = sorted(
            (places[b], end(b)) for b in places if lives[b][0] <= last and first <= lives[b][1]
        )
        places[buffer] = 0
        for begin, stop in rivals:
            if end(buffer) <= begin:
                break
            places[buffer] = max(places[buffer], stop)
    return places, max(map(end, places), default=0)


# ---- from a step function to its program -------------------------------------------------------


def recorded(step: StepFn, planning: Callable[[], bool] = lambda: False) -> StepFn:
    """The step as a program, recorded at its first call; as it is where that cannot be. A program
    has all that it needs of the step, which is let go with its copy of the embeddings.

    planning: whether a call only has to hold a step's memory; asked at each call.
    """
    state = [step]
    del step
    fresh = True

    def run(batch: StepBatch, kv: KV) -> Tensor:
        nonlocal fresh
        if fresh:
            fresh = False
            state[0] = _record(state[0], batch, kv) or state[0]
        made = state[0]
        if planning() and isinstance(made, Program):
            return made.rehearse(batch, kv)
        return made(batch, kv)

    return run


def _record(step: StepFn, batch: StepBatch, kv: KV) -> StepFn | None:
    """The program of a step, None if it has none. Writes to the null block only."""
    small = _small(batch)
    recorder = Recorder(small, kv)
    try:
        with native.told(recorder), recorder:
            want = step(small, kv)
        program = Program(recorder.noted, want, recorder.block_size)
    except Unfit:
        return None
    got = program(small, kv)
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise AssertionError(
            f"a recorded step gives other logits than its recording "
            f"(by up to {(got - want).abs().max().item():.2e}): this is a bug of tokenry-cpu."
        )
    return program


def _small(batch: StepBatch) -> StepBatch:
    """A step of two requests, four tokens and one, all in slots of their own of the null block (the
    one reads what the first of the four wrote).
    """

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return replace(
        batch,
        bucket=Bucket("mixed", REQUESTS, TOKENS, 0),
        token_ids=ints(1, 2, 3, 4, 5),
        positions=ints(0, 1, 2, 3, 0),
        slots=ints(0, 1, 2, 3, 4),
        q_start=ints(0, 4, 5),
        q_lens=ints(4, 1),
        seq_lens=ints(4, 1),
        block_table=torch.zeros((REQUESTS, 1), dtype=torch.int32),
        logit_rows=ints(3, 4),
        extra={},
    )
