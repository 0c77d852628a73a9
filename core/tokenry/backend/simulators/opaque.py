"""sim-opaque: a device whose tensors cannot be looked at; only `fetch` gives values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, ModelSpec, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.backend.simulators.device import SimulatedDevice, map_tensors, refuse_host_read
from tokenry.errors import BackendError


class OpaqueTensor(torch.Tensor):
    """A tensor that computes, and gives only opaque tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it reads a value or an address."""
        refuse_host_read(func)
        if func is torch.Tensor.data_ptr:
            raise BackendError("An opaque tensor has no address.")
        result: Any = Tensor.__torch_function__.__func__(  # type: ignore[attr-defined]  # untyped
            cls, func, types, args, kwargs or {}
        )
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        return f"OpaqueTensor({list(self.shape)}, {self.dtype})"


class SimOpaque(SimulatedDevice):
    """Dynamic shapes; a step takes and gives opaque tensors."""

    caps = Caps(dtypes=("float32", "bfloat16"), block_sizes=(16, 32))

    def wrap(self, layer: Tensor) -> Tensor:
        """An opaque view of a KV layer."""
        return layer.as_subclass(OpaqueTensor)

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model, fed with opaque tensors."""
        step = super().build_model(spec, weights, ops)

        def opaque_step(batch: StepBatch, kv: KV) -> Tensor:
            hidden = map_tensors(batch, lambda t: t.as_subclass(OpaqueTensor))
            return step(hidden, kv)

        return opaque_step

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """The one way out: the values as they are now."""
        with torch._C.DisableTorchFunctionSubclass():
            copies = [t.detach().as_subclass(torch.Tensor).clone() for t in tensors]
        return lambda: [copy.numpy() for copy in copies]
