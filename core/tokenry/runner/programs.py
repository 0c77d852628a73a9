"""Which program runs a bucket: compiled ones by key, the plain step where a device allows it.

Owned by ModelRunner. Programs are made and executed once in `warm_up`; on a static device nothing
else ever runs. First come those that together cover every step, then the others, largest first (so
that pools are sized by the largest). Where the memory for programs ends among the others, the
device serves with the programs that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tokenry.backend.base import Backend, Program, StepBatch
from tokenry.backend.contract import Bucket
from tokenry.errors import DeviceOOM, UncoveredShape
from tokenry.runner.bucket_grid import maxima


class Programs:
    """Owned by ModelRunner."""

    def __init__(self, backend: Backend, step: Program, buckets: Sequence[Bucket]) -> None:
        self._backend = backend
        self._step = step
        self._programs: dict[Bucket, Program] = {}
        first = maxima(buckets)
        self.buckets = (*first, *(bucket for bucket in buckets if bucket not in first))
        self._needed = len(first)
        self.note: str | None = None
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
        """Compile every bucket and execute it once, sampler included.

        Raises DeviceOOM that names the bucket if those that cover every step do not fit; of the
        others, `buckets` keeps those that do, and `note` says so.
        """
        for i, bucket in enumerate(self.buckets):
            batch = example(bucket)
            try:
                self._programs[bucket] = self._backend.compile(self._step, batch)
                execute(batch)
            except DeviceOOM as error:
                if i >= self._needed:
                    self._stop_at(i, error)
                    progress(1.0)
                    break
                raise DeviceOOM(
                    f"No memory to warm up {bucket} ({i} of {len(self.buckets)} programs made): "
                    f"{error.message}",
                    mend="--max-num-seqs, --max-num-batched-tokens or --memory-fraction lower",
                ) from error
            progress((i + 1) / len(self.buckets))

    def _stop_at(self, i: int, error: DeviceOOM) -> None:
        """Go on with the first i programs."""
        self._programs.pop(self.buckets[i], None)
        self.note = (
            f"{i} of {len(self.buckets)} programs fit into the memory, steps are padded to these: "
            f"{error.message} (--max-programs {i} says so from the start)"
        )
        self.buckets = self.buckets[:i]
