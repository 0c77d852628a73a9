"""Which program runs a bucket: compiled ones by key, the plain step where a device allows it.

Owned by ModelRunner. Programs are made and executed once in `warm_up`, largest first (so that pools
are sized by the
largest); on a static device nothing else ever runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tokenry.backend.base import Backend, Program, StepBatch
from tokenry.backend.contract import Bucket
from tokenry.errors import DeviceOOM, UncoveredShape


class Programs:
    """Owned by ModelRunner."""

    def __init__(self, backend: Backend, step: Program, buckets: Sequence[Bucket]) -> None:
        self._backend = backend
        self._step = step
        self._programs: dict[Bucket, Program] = {}
        self.buckets = tuple(buckets)
        self.uncompiled_launches = 0

    def __len__(self) -> int:
        return len(self._programs)

    def run(self, batch: StepBatch) -> Tensor:
        """The bucket's program on the batch."""
        program = self._programs.get(batch.bucket)
        if program is not None:
            return program(batch)
        if self._backend.caps.shapes.static:
            raise UncoveredShape(f"{batch.bucket} was not warmed up; {len(self)} programs were.")
        if self._backend.caps.graphs != "none":
            self.uncompiled_launches += 1
        return self._step(batch)

    def warm_up(
        self,
        example: Callable[[Bucket], StepBatch],
        execute: Callable[[StepBatch], None],
        progress: Callable[[float], None],
    ) -> None:
        """Compile every bucket and execute it once, sampler included. An OOM names the bucket."""
        for i, bucket in enumerate(self.buckets):
            batch = example(bucket)
            try:
                self._programs[bucket] = self._backend.compile(self._step, batch)
                execute(batch)
            except DeviceOOM as error:
                raise DeviceOOM(
                    f"No memory to warm up {bucket} ({i} of {len(self.buckets)} programs made): "
                    f"{error.message}",
                    mend="--max-num-seqs, --max-num-batched-tokens or --memory-fraction lower",
                ) from error
            progress((i + 1) / len(self.buckets))
