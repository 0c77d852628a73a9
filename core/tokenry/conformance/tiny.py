"""Tiny random models, made on the fly, and what they answer: the oracle of the checks.

In: a directory. Out: config.json, model.safetensors and tokenizer.json there; `TinyModel`, which
computes logits with the reference ops on the host, whole texts at once: no paging of its own, no
batch, no engine. Weights are wide, so that the best token stands out from the second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tokenry.backend.base import Backend, StepBatch, StepFn
from tokenry.backend.contract import Bucket, KVSpec, MemoryInfo
from tokenry.backend.ops import OpTable
from tokenry.models.registry import NativeSpec, load_spec

VOCAB = 96
MAX_LEN = 160
_BASE: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_LEN,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "dtype": "float32",
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_BASE, "architectures": ["LlamaForCausalLM"]},
    "gemma2": {
        **_BASE,
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 20,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 16,
    },
    "qwen3_moe": {
        **_BASE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
"""What the ops' options are for: GQA; window, soft cap and gelu; experts and head norms."""


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model on disk; `step` runs it on the host with the reference ops."""

    path: Path
    spec: NativeSpec
    step: StepFn

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[len(tokens), VOCAB], of the whole text in one pass."""
        batch = _whole(len(tokens), tokens)
        spec, size = self.spec, len(tokens)
        shape = (2, 2, size, spec.num_kv_heads, spec.head_dim)
        kv = [torch.zeros(shape) for _ in range(spec.num_layers)]
        found: NDArray[np.float32] = self.step(batch, kv).numpy()
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely continuation, each token from the whole text anew."""
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(prompt) :]


class HostBackend(Backend):
    """The contract's defaults and nothing else: the reference on the host."""

    def memory(self) -> MemoryInfo:
        """More than the tiny models need."""
        return MemoryInfo(total=2**30, free=2**30, used=0)


def _whole(size: int, tokens: Sequence[int]) -> StepBatch:
    """One request in one block of its own size, logits of every row."""

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return StepBatch(
        bucket=Bucket("mixed", 1, size, 0, "all"),
        token_ids=ints(tokens),
        positions=ints(range(size)),
        slots=ints(range(size, 2 * size)),
        q_start=ints([0, size]),
        q_lens=ints([size]),
        seq_lens=ints([size]),
        block_table=ints([1])[None],
        logit_rows=ints(range(size)),
        extra={},
    )


def write_model(path: Path, config: Mapping[str, Any]) -> TinyModel:
    """Random weights, always the same, and the model over them."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    vocab = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    empty = load_spec(path, dtype="float32", dummy=True)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, tensor in empty.weights(lambda share: None):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1:
            weights[name] = (
                (0.1 * noise)
                if config["architectures"][0] == "Gemma2ForCausalLM"
                else (1 + 0.1 * noise)
            )
        else:
            width = 1.0 if name in ("embed_tokens.weight", "lm_head.weight") else 0.2
            weights[name] = noise * width
    save_file(weights, path / "model.safetensors")
    spec = load_spec(path, dtype="float32")
    host = HostBackend()
    step = host.build_model(spec, spec.weights(lambda share: None), OpTable({}))
    return TinyModel(path, spec, step)


def kv_spec(spec: NativeSpec, block_size: int, dtype: str) -> KVSpec:
    """The KV that the model needs."""
    return KVSpec(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype,
    )
