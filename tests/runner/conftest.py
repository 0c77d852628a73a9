"""A small random model on disk, and runners over it on any backend."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from tokenry.backend.discovery import choose, discover, open_backend
from tokenry.models.registry import load_spec
from tokenry.runner.memory import MemoryLimits
from tokenry.runner.runner import ModelRunner, RunnerConfig

VOCAB, HIDDEN, LAYERS = 64, 32, 2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory of a two-layer Llama with random float32 weights."""
    path = tmp_path_factory.mktemp("tiny")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    spec = load_spec(path, dtype="float32", dummy=True)
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, tensor in spec.weights(lambda share: None):
        full = "lm_head.weight" if name == "lm_head.weight" else f"model.{name}"
        noise = torch.randn(tensor.shape, generator=generator)
        weights[full] = noise if tensor.ndim == 2 else 1 + 0.1 * noise
    save_file(weights, path / "model.safetensors")
    return path


@pytest.fixture
def make_runner(tiny):
    """make_runner(backend name, **RunnerConfig and MemoryLimits fields) -> ModelRunner."""

    def make(name="cpu", *, backend=None, processors=None, context=64, **values):
        if backend is None:
            backend = open_backend(choose(discover(name), name), {})
        limits = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_model_len": 64,
            "memory_fraction": 0.5,
            "num_kv_blocks": 40,
        }
        memory = MemoryLimits(**{k: values.pop(k, v) for k, v in limits.items()})
        spec = load_spec(tiny, dtype="float32", max_model_len=context)
        return ModelRunner(
            backend,
            spec,
            spec.weights(lambda share: None),
            RunnerConfig(memory=memory, **values),
            eos_token_ids=(1,),
            processors=processors,
        )

    return make
