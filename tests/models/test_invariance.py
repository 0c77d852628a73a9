"""On a device that claims it, a text's logits are the same bits alone or among others, whole or in
chunks.
"""

import pytest
import torch

from tokenry_cpu.backend import CpuBackend, CpuOptions

MODELS = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 24}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("GPT2Config", {}),
    "fallback": ("StableLmConfig", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_neighbours_and_chunks_change_no_bit(name, make, drive, prompts):
    config_name, fields = MODELS[name]
    path, _ = make(config_name, **fields)
    backend = CpuBackend(CpuOptions(threads=1))
    assert backend.caps.batch_invariant
    driver = drive(path, backend)
    together, _ = driver.greedy(prompts, 2, chunk=13)
    for prompt, among in zip(prompts, together, strict=True):
        alone, _ = driver.greedy([prompt], 2, chunk=128)
        assert torch.equal(alone[0], among)
