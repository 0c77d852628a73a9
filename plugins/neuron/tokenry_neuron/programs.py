"""Programs: one static graph per bucket and per way to draw, compiled before service, looked up in
the cache, and never compiled again.

In: functions and example inputs. Out: the same functions as programs. A program that meets other
shapes than its own raises; a program that is not in the cache raises if it must be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Program, StepBatch
from tokenry.backend.contract import Bucket
from tokenry.errors import BackendError, DeviceOOM, UncoveredShape
from tokenry_neuron import vendor
from tokenry_neuron.cache import Facts, ProgramCache

log = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]
TENSOR_FIELDS = tuple(f.name for f in fields(StepBatch) if f.name not in ("bucket", "extra"))


class ProgramMaker:
    """Makes each program once. Owned by NeuronBackend.

    made       programs of this process.
    compiled   those that the cache did not have.
    """

    def __init__(self, cache: ProgramCache, common: Facts, *, require_compiled: bool) -> None:
        self._cache = cache
        self._common = common
        self._require = require_compiled
        self._samplers: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.made = 0
        self.compiled = 0

    def step(self, step: Program, example: StepBatch, facts: Facts) -> Program:
        """The step of a bucket as a program."""
        bucket = example.bucket
        tensors = _tensors(example)

        def run(batch: StepBatch) -> Tensor:
            return step(batch)

        inputs = dict(zip(tensors, vendor.signature(tuple(tensors.values())), strict=True))
        what = {"program": f"step {describe(bucket)}", "inputs": inputs, **facts}
        program = self._make(run, (example,), what)
        shapes = {name: t.shape for name, t in tensors.items()}

        def guarded(batch: StepBatch) -> Tensor:
            if batch.bucket != bucket or {n: t.shape for n, t in _tensors(batch).items()} != shapes:
                raise UncoveredShape(
                    f"The program of {describe(bucket)} was given {describe(batch.bucket)}."
                )
            return program(batch)

        return guarded

    def sampler(self, kind: str, function: Callable[..., Tensor], inputs: Tensors) -> Tensor:
        """A draw by the program for this kind and these shapes; made when it is first met, which
        is in the warm-up.
        """
        key = (kind, *(t.shape for t in inputs))
        program = self._samplers.get(key)
        if program is None:
            what = {"program": f"sample {kind}", "inputs": vendor.signature(inputs)}
            program = self._samplers[key] = self._make(function, inputs, what)
        return program(*inputs)

    def _make(
        self, function: Callable[..., Tensor], inputs: tuple[Any, ...], what: Facts
    ) -> Callable[..., Tensor]:
        facts = {**self._common, **what}
        known = self._cache.find(facts)
        if known is None and self._require:
            raise self._refusal(facts, self._cache.explain_miss(facts))
        before = self._cache.files()
        program: Callable[..., Tensor] = torch.inference_mode()(
            vendor.compiled(function, digest_name(what["program"]))
        )  # always in the mode in which steps run: another one would be another program
        try:
            program(*inputs)
            vendor.device_module().synchronize()
        except torch.OutOfMemoryError as error:
            raise DeviceOOM(f"No memory for the program {what['program']}: {error}") from error
        fresh = self._cache.files() - before
        self.made += 1
        if known is not None and not fresh:
            return program
        if self._require:
            raise self._refusal(facts, f"the compiler made {len(fresh)} files although it is there")
        self.compiled += 1
        self._cache.store(facts, known.files if known and not fresh else fresh)
        return program

    def _refusal(self, facts: Facts, why: str) -> BackendError:
        return BackendError(
            f"The program {facts['program']} is not in the cache, and require_compiled is set: "
            f"{why}.",
            mend="run `tokenry compile` with the same model, options and package versions, or "
            "leave out require_compiled",
        )


def describe(bucket: Bucket) -> str:
    """A bucket in words."""
    return (
        f"{bucket.phase} seqs={bucket.seqs} tokens={bucket.tokens} kv_blocks={bucket.kv_blocks} "
        f"logits={bucket.logits}"
    )


def digest_name(program: str) -> str:
    """A program's name as an identifier, for the compiler's logs."""
    return "".join(c if c.isalnum() else "_" for c in program)


def _tensors(batch: StepBatch) -> Mapping[str, Tensor]:
    """All tensors of a batch by name."""
    named = {name: getattr(batch, name) for name in TENSOR_FIELDS}
    return {**named, **{f"extra.{name}": t for name, t in batch.extra.items()}}
