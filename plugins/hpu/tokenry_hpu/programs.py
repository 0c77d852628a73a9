"""One program per bucket, in the two ways that the vendor has, and what each of them costs.

In: a step, the bucket's example. Out: a `Program` that takes tensors only (a Python value among the
arguments would be part of the vendor's key), checks their shapes itself and so never compiles
again. Knows nothing of models or of the KV's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from tokenry.backend.base import Program, StepBatch
from tokenry.errors import UncoveredShape
from tokenry_hpu.vendor import DYNAMO_BACKEND, Vendor, typed_oom

Way = Literal["compile", "hpu_graphs", "none"]
FIELDS = (
    "token_ids", "positions", "slots", "q_start", "q_lens", "seq_lens", "block_table", "logit_rows",
)  # fmt: skip
MEND = "--backend-option graph_memory_fraction higher, or --max-num-seqs lower"


class Programs:
    """Makes programs. Owned by HpuBackend.

    made    programs so far, and what the vendor compiled in later runs of them (nothing should).
    bytes   device memory that stayed taken when they had run for the first time.
    """

    def __init__(self, vendor: Vendor, way: Way) -> None:
        self._vendor = vendor
        self._compilations = vendor.count_compilations()
        self._way = way
        self.made = 0
        self.bytes = 0

    def make(self, step: Program, example: StepBatch) -> Program:
        """A program for the shapes of `example`; it is compiled when it first runs."""
        run = self._compiled(_of_tensors(step, example))
        shapes = _shapes(example)
        fresh = True

        def program(batch: StepBatch) -> Tensor:
            nonlocal fresh
            if _shapes(batch) != shapes:
                raise UncoveredShape(f"The program of {example.bucket} was given {_shapes(batch)}.")
            with typed_oom(f"{example.bucket}", MEND):
                first, fresh = fresh, False
                return self._first_run(run, batch) if first else self._run(run, batch)

        return program

    def _compiled(self, function: Callable[..., Tensor]) -> Any:
        if self._way == "compile":
            # Shapes are ours to check, weights and KV stay where they are: without guards a program
            # can never be compiled twice, and a step does not evaluate thousands of them.
            options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
            return torch.compile(
                function, backend=DYNAMO_BACKEND, dynamic=False, fullgraph=True, options=options
            )
        if self._way == "hpu_graphs":
            return self._vendor.wrap(_Module(function))
        return function

    def _run(self, run: Callable[..., Tensor], batch: StepBatch) -> Tensor:
        self._vendor.mark()
        before = self._compilations()
        out = run(*_tensors(batch))
        self._vendor.mark()
        self.made += self._compilations() - before
        return out

    def _first_run(self, run: Callable[..., Tensor], batch: StepBatch) -> Tensor:
        hpu = self._vendor.hpu
        hpu.synchronize()
        before = hpu.mem_get_info()[0]
        made = self.made
        out = self._run(run, batch)
        hpu.synchronize()
        self.made = made + 1  # however many recipes the vendor makes of one program
        self.bytes += max(0, before - hpu.mem_get_info()[0] - out.nbytes)
        return out


class _Module(torch.nn.Module):
    """A function as the module that wrap_in_hpu_graph wants."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        """Of the function."""
        return self._function(*tensors)


def _of_tensors(step: Program, example: StepBatch) -> Callable[..., Tensor]:
    """`step` as a function of the batch's tensors, with a code object of its own: dynamo counts and
    limits what it compiles per code object.
    """
    bucket, extra = example.bucket, tuple(example.extra)

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(FIELDS, tensors, strict=False))
        more = dict(zip(extra, tensors[len(FIELDS) :], strict=True))
        return step(StepBatch(bucket=bucket, extra=more, **named))

    name = f"{bucket.phase}_{bucket.seqs}_{bucket.tokens}_{bucket.kv_blocks}_{bucket.logits}"
    code = run.__code__.replace(co_name=name)
    return FunctionType(code, run.__globals__, name, None, run.__closure__)


def _tensors(batch: StepBatch) -> tuple[Tensor, ...]:
    return (*(getattr(batch, name) for name in FIELDS), *batch.extra.values())


def _shapes(batch: StepBatch) -> tuple[Any, ...]:
    return (batch.bucket, *((t.shape, t.dtype) for t in _tensors(batch)))
