"""Which kernel a layer runs: the backend's if it has one that can, else the reference op, counted.

In: `Backend.ops()`. Out: `OpTable.resolve(name, **meta)`, called by layers while the model is
built, never in a step.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenry.backend.base import Op
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.errors import BackendError


class OpTable:
    """The ops of one loaded model.

    fallbacks   how often a layer got the reference op, by op name: printed at start and shown in
                the metrics.
    """

    def __init__(
        self, backend_ops: Mapping[str, Op] | None = None, quantization: str | None = None
    ) -> None:
        """quantization: a format of the backend's `caps.quant`, for the weights of `pack`."""
        self._ops = dict(backend_ops or {})
        self._quantization = quantization
        for name, op in self._ops.items():
            _check(name, op)
        self.fallbacks: dict[str, int] = {}

    def resolve(self, name: str, **meta: Any) -> Op:
        """The op for a layer; meta (dtype, head_dim, window, ...) is what `Op.supports` may look
        at.
        """
        op = self._ops.get(name)
        if op is not None and _takes_sinks(op, meta) and op.supports(**meta):
            return op
        reference = REFERENCE_OPS[name]
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1
        return reference

    def pack(self, op: Op, weights: Mapping[str, Tensor], *, head: bool = False) -> Any:
        """The weights of a `linear` or `moe` op as it wants them, quantised where that was asked.

        head: it gives the logits, where 4 bits cost more than they save: 8 are kept.
        Raises BackendError where the op that the layer got cannot.
        """
        if self._quantization is None:
            return op.pack(weights)
        quantize = getattr(op, "quantize", None)
        if quantize is None:
            raise BackendError(
                f"--quantization {self._quantization}: {type(op).__name__}, which a layer of this "
                "model got, has no quantised weights.",
                mend="leave --quantization out",
            )
        narrow = head and self._quantization == "int4"
        return quantize(weights, "int8" if narrow else self._quantization)


def _takes_sinks(op: Op, meta: Mapping[str, Any]) -> bool:
    """Whether a layer with sinks can hand them over: an op may be older than they are, and its
    `supports` look at nothing of them.
    """
    return not meta.get("sinks") or "sinks" in inspect.signature(op.__call__).parameters


def _check(name: str, op: Op) -> None:
    """Raises BackendError for a name that is none of the seven, or an op that lacks methods."""
    if name not in REFERENCE_OPS:
        near = difflib.get_close_matches(name, REFERENCE_OPS, n=1)
        raise BackendError(
            f"The backend offers an op {name!r}; the ops are {', '.join(REFERENCE_OPS)}.",
            mend=f"did you mean {near[0]!r}?" if near else None,
        )
    missing = [m for m in ("supports", "pack", "__call__") if not callable(getattr(op, m, None))]
    if missing:
        raise BackendError(
            f"The backend's op {name!r} ({type(op).__name__}) lacks {', '.join(missing)}."
        )
