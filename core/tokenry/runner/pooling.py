"""From hidden rows to vectors: what ModelRunner does for requests that end with one.

In: a launch's output and the states of its requests. Out: tensors to be fetched, and from the
fetched arrays the vector of each row. The last row of a text comes out of any launch; for the mean,
or the first row, a text is computed as for prompt log-probabilities: alone in its launches, every
row wanted. Knows nothing of models: what follows the pooling is a `PooledHead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenry.plan import RowResult, StepResult
from tokenry.pooling import PoolingParams
from tokenry.runner.requests import RequestState
from tokenry.runner.results import PartialStep, PooledRow
from tokenry.runner.shapes import Launch, Share

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

    def take(
        self, launch: Launch, states: Sequence[RequestState], output: Tensor, partial: PartialStep
    ) -> Tensor | None:
        """Note the texts that end with this launch; its logits, None where nobody draws."""
        partial.pooled += self._ends(launch, states, output[:, : self._hidden], partial.tensors)
        draws = any(state.pooling is None for state in states)
        return self.logits(output) if draws else None

    def _ends(
        self, launch: Launch, states: Sequence[RequestState], hidden: Tensor, tensors: list[Tensor]
    ) -> list[PooledRow]:
        """What the vectors are made of is added to `tensors`."""
        if launch.scored:
            share, state = launch.shares[0], states[0]
            if state.pooling is None:
                return []
            return self._add(share, state, state.pooling, hidden, tensors)
        at = len(tensors)
        ends = [
            PooledRow(params=state.pooling, row=share.row, at=at, i=i)
            for i, (share, state) in enumerate(zip(launch.shares, states, strict=True))
            if state.pooling is not None and share.start + share.count == state.num_prompt
        ]
        if ends:  # a copy: a replayed program writes its next output to the same place
            tensors.append(hidden.clone())
        return ends

    def _add(
        self, share: Share, state: RequestState, params: PoolingParams, hidden: Tensor,
        tensors: list[Tensor],
    ) -> list[PooledRow]:  # fmt: skip
        """Rows [start, start + count) of one text, the whole launch."""
        if self.head.method == "mean":
            total = hidden[: share.count].sum(0, keepdim=True)
            state.pooled = total if state.pooled is None else state.pooled + total
        elif share.start == 0:
            state.pooled = hidden[:1].clone()
        if share.start + share.count < state.num_prompt or state.pooled is None:
            return []
        tensors.append(state.pooled)
        factor = 1.0 / state.num_prompt if self.head.method == "mean" else 1.0
        at = len(tensors) - 1
        return [PooledRow(params=params, row=share.row, at=at, i=0, factor=factor)]

    def complete(
        self,
        result: StepResult,
        pooled: Sequence[PooledRow],
        arrays: Sequence[NDArray[Any]],
    ) -> StepResult:
        """The result with the vectors in their rows; arrays: the step's fetched tensors."""
        rows = list(result.rows)
        for one in pooled:
            row = rows[one.row]
            if row.error is None:
                values = arrays[one.at][one.i] * np.float32(one.factor)
                rows[one.row] = pooled_result(row.request_id, self.head, values, one.params)
        return StepResult(step=result.step, rows=tuple(rows))


def pooled_result(
    request_id: str, head: PooledHead, row: Floats, params: PoolingParams
) -> RowResult:
    """The vector as it crosses to the engine, float32 little-endian, or that it is not finite."""
    values = head.finish(row, params)
    if not np.isfinite(values).all():
        return RowResult(request_id=request_id, error=NAN_ROW)
    return RowResult(request_id=request_id, pooled=values.astype("<f4").tobytes())
