"""What every model's spec tells of its checkpoint.

In: a checkpoint directory and its config. Out: `Spec`, with `DecoderSpec` for models that keep KV;
each kind of model adds how its weights are read and its step is made. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenry.models.config import ModelConfig
from tokenry.models.weights import weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a `backend.base.ModelSpec` says of itself, and what the runner needs of it.

    dummy    random weights instead of the checkpoint's.
    notes    lines for the start-up log.
    """

    path: Path
    model: ModelConfig
    dtype: str
    max_model_len: int
    dummy: bool
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """As config.json names it."""
        return self.model.architecture

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self.model.raw

    @property
    def vocab_size(self) -> int:
        """Token ids that have an embedding: logits per row, where there are logits."""
        return self.model.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(Spec):
    """Of a model with KV, which draws tokens."""

    @property
    def num_layers(self) -> int:
        """Layers with KV."""
        return self.model.num_layers

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.model.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Of keys and values."""
        return self.model.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.model.eos_token_ids

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the model's dtype, or the checkpoint's if that is smaller (a
        backend may keep it), from file sizes; 0 for dummy weights.
        """
        if self.dummy:
            return 0
        size = {"float32": 4, "float16": 2, "bfloat16": 2}
        smaller = min(size[self.dtype], size[self.model.dtype])
        return weight_bytes(self.path) * smaller // size[self.model.dtype]
