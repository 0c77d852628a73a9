"""Which kernel a layer runs: the backend's if it has one that can, else the reference op, counted.

In: `Backend.ops()`. Out: `OpTable.resolve(name, **meta)`, called by layers while the model is
built, never in a step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from tokenry.backend.base import Op
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.errors import BackendError


class OpTable:
    """The ops of one loaded model.

    fallbacks   how often a layer got the reference op, by op name: printed at start and shown in
                the metrics.
    """

    def __init__(self, backend_ops: Mapping[str, Op] | None = None) -> None:
        self._ops = dict(backend_ops or {})
        for name, op in self._ops.items():
            _check(name, op)
        self.fallbacks: dict[str, int] = {}

    def resolve(self, name: str, **meta: Any) -> Op:
        """The op for a layer; meta (dtype, head_dim, window, ...) is what `Op.supports` may look
        at.
        """
        op = self._ops.get(name)
        if op is not None and op.supports(**meta):
            return op
        reference = REFERENCE_OPS[name]
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1
        return reference


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
