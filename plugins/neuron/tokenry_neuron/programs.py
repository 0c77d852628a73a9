"""Programs: one static graph per bucket and per way to draw, compiled before service, looked up in
the cache, and never compiled again.

In: functions and example inputs. Out: the same functions as programs. A program that meets other
shapes than its own raises; so does one that is not in the cache, if it must be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Program, StepBatch
from tokenry.errors import BackendError, DeviceOOM, UncoveredShape
from tokenry_neuron import vendor
from tokenry_neuron.cache import Facts, ProgramCache

log = logging.getLogger(__name__)
LATE = "set TORCH_NEURONX_NEFF_CACHE_DIR to it before the start, or programs are compiled anew"
"""torch loads the vendor's package before this plugin, which can be too early for the variable."""
TENSORS = tuple(f.name for f in fields(StepBatch) if f.name not in ("bucket", "extra"))


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
        self.made = self.compiled = 0

    def step(self, step: Program, example: StepBatch, facts: Facts) -> Program:
        """The step of a bucket as a program."""
        bucket = example.bucket
        tensors = {name: getattr(example, name) for name in TENSORS} | dict(example.extra)
        shapes = {name: vendor.signature(tensor) for name, tensor in tensors.items()}

        def run(batch: StepBatch) -> Tensor:
            return step(batch)

        what = {"program": str(bucket), "inputs": shapes, **facts}
        program = self._make(run, (example,), what)

        def guarded(batch: StepBatch) -> Tensor:
            if batch.bucket != bucket:
                raise UncoveredShape(f"The program of {bucket} was given {batch.bucket}.")
            return program(batch)

        return guarded

    def sampler(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A draw by the program of this function and these shapes; it is made when it is first
        met, which is in the warm-up.
        """
        key = (function, *(t.shape for t in inputs))
        program = self._samplers.get(key)
        if program is None:
            shapes = [vendor.signature(t) for t in inputs]
            what = {"program": f"sampler {function.__name__}", "inputs": shapes}
            program = self._samplers[key] = self._make(function, inputs, what)
        return program(*inputs)

    def _make(
        self, function: Callable[..., Tensor], inputs: tuple[Any, ...], what: Facts
    ) -> Callable[..., Tensor]:
        facts = {**self._common, **what}
        known = self._cache.has(facts)
        if self._require and not known:
            raise _missing(facts, self._cache.explain_miss(facts))
        before = self._cache.files()
        # always in the mode in which steps run: another one would be another program
        program: Callable[..., Tensor] = torch.inference_mode()(vendor.compiled(function))
        try:
            program(*inputs)
            vendor.device_module().synchronize()
        except torch.OutOfMemoryError as error:
            raise DeviceOOM(f"No memory for the program {facts['program']}: {error}") from error
        fresh = self._cache.files() - before
        self.made += 1
        if known and not fresh:
            return program
        if self._require:
            raise _missing(facts, f"the compiler made {len(fresh)} files although it is listed")
        if fresh or before:
            self._cache.store(facts, fresh)
        elif not self.compiled:
            log.warning("the compiler keeps nothing in %s: %s", self._cache.graphs, LATE)
        self.compiled += 1
        return program


def _missing(facts: Facts, why: str) -> BackendError:
    return BackendError(
        f"The program {facts['program']} is not in the cache (require_compiled=true): {why}.",
        mend="tokenry compile with the same model, options and versions, or no require_compiled",
    )
