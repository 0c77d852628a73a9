"""From names in a checkpoint to the layers that wait for them.

In: layers say which tensor they expect and what is to be done with it (`expect`). Out: `load` feeds
a stream of weights to them and says what is missing, unknown or misshaped. A layer that needs
several tensors keeps them until the last is there, packs them and lets the raw ones go.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenry.backend.base import WeightIter
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError

Take = Callable[[Tensor], None]
IGNORED = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"  # tables that old checkpoints carry
    r"|\.attn\.(masked_)?bias$"  # GPT-2's causal mask
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A tensor that is waited for."""

    shape: tuple[int, ...]
    take: Take


@dataclass(slots=True, kw_only=True)
class Loader:
    """What the layers of one model need to be built and filled.

    ops      where a layer finds its kernels      device, dtype   where the weights go
    where    tensor name -> the file it is in, for errors
    ignored  tensors that may be there and are not needed (a tied head)
    """

    ops: OpTable
    device: torch.device
    dtype: torch.dtype
    where: Callable[[str], str]
    slots: dict[str, Slot] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What is expected."""
        return {name: slot.shape for name, slot in self.slots.items()}

    def expect(self, name: str, shape: tuple[int, ...], take: Take) -> None:
        """Hand the tensor `name` to `take`, moved to the device; dtype stays the file's."""
        self.slots[name] = Slot(shape=shape, take=take)

    def load(self, weights: WeightIter) -> None:
        """Feed all. Raises ModelLoadError."""
        for name, tensor in weights:
            self.feed(name, tensor)
        missing = [name for name in self.slots if name not in self.filled]
        if missing:
            raise ModelLoadError(
                f"{self.where(missing[0])} lacks {_some(missing)}.",
                mend="the weights do not belong to this config.json, or the download is incomplete",
            )

    def feed(self, name: str, tensor: Tensor) -> None:
        """One tensor to its layer."""
        slot = self.slots.get(name)
        if slot is None:
            known = self._renamed(name)
            if known is not None:
                return self.feed(known, tensor)
            if name in self.ignored or IGNORED.search(name):
                return None
            raise ModelLoadError(
                f"{self.where(name)}: {name} {_shape(tensor.shape)} is no weight of this model.",
                mend="the weights do not belong to this config.json",
            )
        if tuple(tensor.shape) != slot.shape:
            raise ModelLoadError(
                f"{self.where(name)}: {name} is {_shape(tensor.shape)}, config.json asks for "
                f"{_shape(slot.shape)}.",
                mend="the weights do not belong to this config.json",
            )
        slot.take(tensor.to(self.device))
        self.filled.add(name)
        return None

    def _renamed(self, name: str) -> str | None:
        """Some checkpoints leave out the outermost module ("transformer.", "model."), or add it."""
        inner = name.split(".", 1)[-1]
        if inner in self.slots and inner != name:
            return inner
        return next(
            (f"{p}.{name}" for p in ("model", "transformer") if f"{p}.{name}" in self.slots), None
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
