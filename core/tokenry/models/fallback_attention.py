"""Our attention op in the place of transformers' own, for the fallback.

In: q, k, v of packed rows as transformers hands them to its attention interface, and the step they
belong to. Out: the attended values. What is not plain causal attention is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenry.backend.base import KV, Op, StepBatch
from tokenry.backend.ops import OpTable
from tokenry.errors import Unsupported

if TYPE_CHECKING:
    from tokenry.models.fallback import FallbackSpec

HARMLESS = {"position_ids", "cache_position"}
"""Tensors that may come with an attention call without changing what it computes."""


class PagedAttention:
    """Our attention op in the form that transformers calls. Owned by one `_Step`, which says by
    `begin` what the calls that follow are about.
    """

    def __init__(self, spec: FallbackSpec, ops: OpTable) -> None:
        self._spec, self._ops = spec, ops
        self._found: dict[tuple[Any, ...], Op] = {}
        self._batch: StepBatch | None = None
        self._kv: KV = None
        self.seen: set[int] = set()

    @property
    def name(self) -> str:
        """In transformers' AttentionInterface: unique, for the interface keeps us alive."""
        return f"tokenry_paged_{id(self)}"

    def begin(self, batch: StepBatch, kv: KV) -> None:
        """A step begins."""
        self._batch, self._kv = batch, kv

    def end(self) -> None:
        """It is over; the batch's memory may go."""
        self._batch = self._kv = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """q, k, v [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
        where = type(module).__name__
        _refuse_strange(where, module, kwargs)
        if value.shape != key.shape or query.shape[3] != key.shape[3]:
            raise Unsupported(
                f"{where} has keys of {key.shape[3]} and values of {value.shape[3]} numbers; the "
                "fallback's KV holds equal ones."
            )
        layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module's number
        head_dim = key.shape[3]
        window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
        softcap, scale = kwargs.get("softcap"), kwargs.get("scaling")
        op = self._resolve(query.shape[1], key.shape[1], head_dim, window, softcap)
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        scale = head_dim**-0.5 if scale is None else float(scale)
        out: Tensor = op(
            q, k, v, self._kv[layer], self._batch, scale=scale, window=window, softcap=softcap
        )
        self.seen.add(layer)
        return out.view(1, *q.shape), None

    def _resolve(self, *key: Any) -> Op:
        """The op of a layer of this form; looked up in the first step, then remembered."""
        op = self._found.get(key)
        if op is None:
            num_heads, num_kv_heads, head_dim, window, softcap = key
            spec = self._spec
            if (num_kv_heads, head_dim) != (spec.num_kv_heads, spec.head_dim):
                raise Unsupported(
                    f"{spec.architecture} has {num_kv_heads} key heads of {head_dim}, config.json "
                    f"says {spec.num_kv_heads} of {spec.head_dim}."
                )
            op = self._found[key] = self._ops.resolve(
                "attention", dtype=spec.dtype, head_dim=head_dim, num_heads=num_heads,
                num_kv_heads=num_kv_heads, window=window, softcap=softcap,
            )  # fmt: skip
        return op

    def check(self) -> None:
        """Every layer must have come to us, or its text is lost between steps."""
        lost = set(range(self._spec.num_layers)) - self.seen
        if lost:
            raise Unsupported(
                f"{len(lost)} of {self._spec.num_layers} layers of {self._spec.architecture} keep "
                "a state that is no KV, or do not use transformers' attention interface."
            )


def _refuse_strange(where: str, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises Unsupported for an attention that is not plain causal attention."""
    strange = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in HARMLESS]
    if strange:
        raise Unsupported(
            f"{where} wants {', '.join(strange)} in its attention, which the fallback cannot do."
        )
    if not (kwargs.get("is_causal") or getattr(module, "is_causal", True)):
        raise Unsupported(f"{where} is not causal attention.")
