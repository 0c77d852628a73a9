"""sim-whole: a static device that cannot continue a prompt: no chunks, no cached beginning."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tokenry.backend.base import KV, ModelSpec, StepBatch, StepFn, WeightIter
from tokenry.backend.ops import OpTable
from tokenry.backend.simulators.static import ONE_PREFILL, SimBaked
from tokenry.errors import BackendError


class SimWhole(SimBaked):
    """As sim-neuron, but a row of several tokens must be a whole prompt."""

    caps = replace(SimBaked.caps, phases=replace(ONE_PREFILL, chunked=False))

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model behind the check of rows."""
        step = super().build_model(spec, weights, ops)

        def whole(batch: StepBatch, kv: KV) -> Tensor:
            _refuse_chunks(batch)
            return step(batch, kv)

        return whole


def _refuse_chunks(batch: StepBatch) -> None:
    """Raises BackendError for a row that has several new tokens and cached ones before them."""
    if batch.bucket.phase == "decode":
        return
    lengths = zip(batch.q_lens.tolist(), batch.seq_lens.tolist(), strict=True)
    for row, (new, total) in enumerate(lengths):
        if new and total != new:
            raise BackendError(
                f"Row {row} has {new} new tokens after {total - new} cached ones: this device "
                "takes whole prompts only."
            )
