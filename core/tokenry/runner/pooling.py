"""From hidden rows to vectors: what ModelRunner does for requests that end with one.

In: a launch's output and the states of its requests. Out: tensors to be fetched, and from the
fetched arrays the vector of each text. The last row of a text comes out of any launch; for the
mean, or the first row, a text is computed as for prompt log-probabilities: alone in its launches,
every row wanted. On the device nothing but a copy of the rows is made, whatever the step, so a
device that compiles knows it from the warm-up; the rest is done on the host. Knows nothing of
models: what follows the pooling is a `PooledHead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Backend
from tokenry.plan import RowResult, StepResult
from tokenry.pooling import PoolingParams
from tokenry.runner.requests import RequestState
from tokenry.runner.results import PartialStep, PooledRows
from tokenry.runner.shapes import Launch

Floats = NDArray[np.float32]
NAN_ROW = (
    "The model's hidden state is NaN or infinite: its weights or this text overflow the dtype."
)


class PooledHead(Protocol):
    """What a model does with the one row that pooling leaves; `models.head.Head` is the real
    one.
    """

    @property
    def method(self) -> Literal["cls", "mean", "last"]:
        """Which rows are pooled."""

    def finish(self, row: Floats, params: PoolingParams) -> Floats:
        """[hidden] -> [width]. A pure function of the row."""
        ...


class Pooler:
    """Owned by ModelRunner.

    hidden   values of a hidden row.
    tokens   the model's step gives hidden rows and logits, side by side; else hidden rows alone.
    """

    def __init__(self, head: PooledHead, *, hidden: int, tokens: bool) -> None:
        self.head = head
        self._hidden = hidden
        self._tokens = tokens

    def wants_all(self, state: RequestState) -> bool:
        """Whether every row of the text is pooled, not only its last."""
        return state.pooling is not None and self.head.method != "last"

    def logits(self, output: Tensor) -> Tensor | None:
        """What the sampler gets; None: the model gives no tokens."""
        return output[:, self._hidden :].contiguous() if self._tokens else None

    def try_out(self, output: Tensor, backend: Backend) -> Tensor | None:
        """The logits, after what `take` does on the device."""
        backend.fetch([self._rows(output)])()
        return self.logits(output)

    def take(
        self, launch: Launch, states: Sequence[RequestState], output: Tensor, partial: PartialStep
    ) -> Tensor | None:
        """Note the rows that texts need of this launch; its logits, None where nobody draws."""
        at, needed = len(partial.tensors), len(partial.pooled)
        for i, (share, state) in enumerate(zip(launch.shares, states, strict=True)):
            ends = share.start + share.count == state.num_prompt
            if state.pooling is not None and (ends or launch.scored):
                count = share.count if launch.scored else 1
                partial.pooled.append(
                    PooledRows(state=state, row=share.row, at=at, first=i, count=count, ends=ends)
                )
        if len(partial.pooled) > needed:
            partial.tensors.append(self._rows(output))
        return self.logits(output) if any(state.pooling is None for state in states) else None

    def _rows(self, output: Tensor) -> Tensor:
        """A copy: a replayed program writes its next output to the same place."""
        return output[:, : self._hidden].clone()

    def complete(
        self, result: StepResult, partial: PartialStep, arrays: Sequence[NDArray[Any]]
    ) -> StepResult:
        """The result with the vectors in their rows; arrays: the step's fetched tensors."""
        rows = list(result.rows)
        for one in partial.pooled:
            new = arrays[one.at][one.first : one.first + one.count]
            state, row = one.state, rows[one.row]
            if self.head.method == "mean":
                total = new.sum(0, dtype=np.float64)
                state.pooled = total if state.pooled is None else state.pooled + total
            elif self.head.method == "last":
                state.pooled = new[-1]
            elif state.pooled is None:
                state.pooled = new[0]
            if one.ends and row.error is None and state.pooling is not None:
                divisor = state.num_prompt if self.head.method == "mean" else 1
                values = (state.pooled / divisor).astype(np.float32)
                rows[one.row] = pooled_result(row.request_id, self.head, values, state.pooling)
        return StepResult(step=result.step, rows=tuple(rows))


def pooled_result(
    request_id: str, head: PooledHead, row: Floats, params: PoolingParams
) -> RowResult:
    """The vector as it crosses to the engine, float32 little-endian, or that it is not finite."""
    values = head.finish(row, params)
    if not np.isfinite(values).all():
        return RowResult(request_id=request_id, error=NAN_ROW)
    return RowResult(request_id=request_id, pooled=values.astype("<f4").tobytes())
