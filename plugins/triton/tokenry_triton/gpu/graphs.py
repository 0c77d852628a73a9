"""Captured programs: the step's kernels are recorded once per bucket and replayed as one launch.

In: a step, the bucket's example. Out: a `Program` and what all of them hold in bytes. All programs
share one pool of memory, one input buffer and one output buffer, each as large as the first (the
core makes the largest first): at most one program runs at a time, and what one gave is used before
the next is launched. So a program costs its recorded launches and nothing else.

A replay is one small copy into the input buffer, then the graph. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Program, StepBatch
from tokenry.errors import UncoveredShape
from tokenry_triton.gpu.memory import typed_errors

FIELDS = (
    "token_ids", "positions", "slots", "q_start", "q_lens", "seq_lens", "block_table", "logit_rows",
)  # fmt: skip
MEND = "--max-programs or --max-num-seqs lower, or --backend-option graph_memory higher"


class Captures:
    """Makes programs. Owned by GpuBackend, whose device the caller has made current.

    made   programs so far.    bytes  device memory that they hold: pool, buffers, recordings.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._device = torch.device("cuda", index)
        self._pool: Any = None
        self._stream: Any = None
        self._inputs = torch.empty(0)
        self._outputs = torch.empty(0)
        self.made = 0
        self.bytes = 0

    def make(self, step: Program, example: StepBatch) -> Program:
        """The program for `example.bucket`. Raises DeviceOOM; a batch of another shape is
        UncoveredShape.
        """
        torch.cuda.synchronize(self._index)
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info(self._index)[0]
        with typed_errors(f"the program of {example.bucket}", self._index, MEND):
            packed = _packed(example)
            self._inputs = self._grown(self._inputs, packed.numel(), torch.int32)
            graph, fixed, out = self._capture(step, example, packed)
        torch.cuda.synchronize(self._index)
        torch.cuda.empty_cache()
        self.bytes += max(0, before - torch.cuda.mem_get_info(self._index)[0])
        self.made += 1
        shapes = _shapes(example)

        def program(batch: StepBatch) -> Tensor:
            given = _packed(batch)
            if given.shape != fixed.shape or batch.bucket != example.bucket:
                raise UncoveredShape(
                    f"The program of {example.bucket} was given {batch.bucket}, "
                    f"{given.numel()} numbers instead of {fixed.numel()}."
                )
            assert _shapes(batch) == shapes
            fixed.copy_(given, non_blocking=True)
            graph.replay()
            return out

        return program

    def _capture(
        self, step: Program, example: StepBatch, packed: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """The recording, its packed inputs and its output, which stay where they are."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
        fixed = self._inputs[: packed.numel()]
        fixed.copy_(packed)
        batch = _views(fixed, example, packed)
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):  # kernels are loaded, libraries take their workspace
            once = step(batch)
        now.wait_stream(self._stream)
        torch.cuda.synchronize(self._index)
        self._outputs = self._grown(self._outputs, once.numel(), once.dtype)
        out = self._outputs[: once.numel()].view(once.shape)
        del once
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            # into a buffer of ours: a result that is kept in the pool could not be reused there
            out.copy_(step(batch))
        return graph, fixed, out

    def _grown(self, buffer: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """A buffer of at least that size; recordings keep the one that they were made with."""
        if buffer.numel() >= size and buffer.dtype == dtype and buffer.device == self._device:
            return buffer
        return torch.zeros(size, dtype=dtype, device=self._device)


def _named(batch: StepBatch) -> Mapping[str, Tensor]:
    return {**{name: getattr(batch, name) for name in FIELDS}, **batch.extra}


def _shapes(batch: StepBatch) -> tuple[Any, ...]:
    return tuple((name, t.shape, t.dtype) for name, t in _named(batch).items())


def _packed(batch: StepBatch) -> Tensor:
    """[n] int32, all inputs of the batch: the buffer that they are views of, or one made of them
    (on the device) where they are not.
    """
    tensors = list(_named(batch).values())
    storage = tensors[0].untyped_storage()
    if all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors):
        size = storage.nbytes() // tensors[0].element_size()
        return tensors[0].as_strided((size,), (1,), 0)
    return torch.cat([t.reshape(-1) for t in tensors])


def _views(fixed: Tensor, example: StepBatch, packed: Tensor) -> StepBatch:
    """The example's tensors as views of `fixed`, each where it is in `packed`."""
    views: dict[str, Any] = {}
    at = 0
    for name, tensor in _named(example).items():
        shared = tensor.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        start = tensor.storage_offset() if shared else at
        views[name] = fixed[start : start + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    extra = {name: views.pop(name) for name in example.extra}
    return replace(example, extra=extra, **views)
