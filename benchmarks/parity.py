"""The parity table: small random models of every family against transformers, on the CPU backend
and the simulators.

    python benchmarks/parity.py [--backends cpu,sim-cuda,...] [--families llama,...] [--tokens 24]

For each family and backend: how many greedy tokens equal those of transformers, and the greatest
difference of a
prompt token's log-probability. Prompts are prefilled in chunks of 16 tokens; every prompt is served
twice, the second
time from the prefix cache, and must give the same tokens. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenry import LLM, SamplingParams
from tokenry.hub import find_model

VOCAB = 4096
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE = {"num_experts_per_tok": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    ),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **MOE}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 32, **MOE},
    ),
    "gpt2": ("GPT2Config", {}),
    "fallback (stablelm)": ("StableLmConfig", {}),
}
BACKENDS = ("cpu", "sim-cuda", "sim-hpu", "sim-neuron", "sim-whole", "sim-opaque")


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """One cell of the table."""

    equal: int
    total: int
    worst: float

    def __str__(self) -> str:
        return f"{self.equal}/{self.total}  {self.worst:.0e}"


def make_model(family: str, at: Path) -> transformers.PreTrainedModel:
    """A random fp32 model of the family, saved with the demo model's tokenizer beside it."""
    config_name, own = FAMILIES[family]
    values = {**SHARED, **own}
    if config_name == "GPT2Config":
        values = {
            "vocab_size": VOCAB,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "initializer_range": 0.15,
        }
    torch.manual_seed(1)
    config = getattr(transformers, config_name)(**values)
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        .eval()
        .float()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(at)
    return model


def prompts() -> list[list[int]]:
    """Ragged token-id prompts, two of which share a beginning."""
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(5, VOCAB, (70,), generator=generator).tolist()
    return [long, [*long[:40], 7, 8, 9], long[:1], long[5:22], long[::-1]]


@torch.no_grad()
def oracle(
    model: transformers.PreTrainedModel, num_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens of each prompt, and the log-probabilities of its own tokens."""
    answers, logprobs = [], []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(num_tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            if len(ids) == len(prompt):
                table = torch.log_softmax(logits.float(), -1)
                logprobs.append(table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
            ids.append(int(logits[-1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers, logprobs


def compare(at: Path, backend: str, want: tuple[list[list[int]], list[torch.Tensor]]) -> Score:
    """Serve the prompts and count."""
    num_tokens = len(want[0][0])
    plain = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    equal = total = 0
    worst = 0.0
    with LLM(
        str(at),
        backend=backend,
        tokenizer=str(find_model("demo")),
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        num_kv_blocks=96,
        block_size=None,
    ) as llm:
        for _ in range(2):
            for output, tokens in zip(
                llm.generate(prompts(), plain, use_tqdm=False), want[0], strict=True
            ):
                got = output.outputs[0].token_ids
                equal += sum(a == b for a, b in zip(got, tokens, strict=True))
                total += len(tokens)
        for output, logprobs, prompt in zip(
            llm.generate(prompts(), scored, use_tqdm=False), want[1], prompts(), strict=True
        ):
            assert output.prompt_logprobs is not None
            for entry, token, expected in zip(
                output.prompt_logprobs[1:], prompt[1:], logprobs, strict=True
            ):
                assert entry is not None
                gap = abs(entry[token].logprob - float(expected))
                worst = gap if math.isnan(gap) else max(worst, gap)
    return Score(equal, total, worst)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    backends = args.backends.split(",")
    print("| family | " + " | ".join(backends) + " |\n|---" * 1 + "|---" * len(backends) + "|")
    failed = False
    for family in args.families.split(","):
        with tempfile.TemporaryDirectory() as directory:
            want = oracle(make_model(family, Path(directory)), args.tokens)
            scores = [compare(Path(directory), backend, want) for backend in backends]
        failed |= any(s.equal != s.total or not s.worst <= 1e-4 for s in scores)
        print(f"| {family} | " + " | ".join(map(str, scores)) + " |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
