"""The kernels that the device has; what is missing here runs as the core's reference op."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional


class Linear:
    """The device's matrix product, in the model's dtype (the reference goes through float32)."""

    def supports(self, **meta: Any) -> bool:
        """Every shape and dtype of the Caps."""
        return True

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As they are; a device with a layout of its own makes it here, once at load."""
        return weights

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[T, out]."""
        return functional.linear(x, weights["weight"], weights.get("bias"))
