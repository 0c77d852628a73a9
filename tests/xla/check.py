"""The Neuron plugin's kernels through XLA on the host: same tokens, no second compilation, KV in
place.

    make xla            # makes an environment with torch 2.9 and torch_xla (3 GB), then runs this

Prints a line per model; exit code 1 if one does not hold. What it shows is that the step lowers to
static graphs with no operation left to the host. It says nothing about the vendor's compiler.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch_xla
import torch_xla.debug.metrics as xla

torch.inference_mode = torch.no_grad  # torch_xla has no inference tensors

from tokenry import LLM, SamplingParams  # noqa: E402
from tokenry.conformance.tiny import FAMILIES, write_model  # noqa: E402
from tokenry.hub import find_model  # noqa: E402

LIMITS = {"dtype": "float32", "max_model_len": 160, "max_num_seqs": 2, "block_size": 32}
LIMITS |= {"max_num_batched_tokens": 128, "kv_cache_bytes": "16MiB", "progress": False}
PROMPTS = [[5 + i for i in range(7)], [9 + (i * 7) % 40 for i in range(70)], [11, 12, 13]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(llm: LLM) -> list[list[int]]:
    """Greedy tokens of all prompts."""
    given = [{"prompt_token_ids": p} for p in PROMPTS]
    return [list(out.outputs[0].token_ids) for out in llm.generate(given, GREEDY, use_tqdm=False)]


def compiled() -> int:
    """Graphs that XLA compiled so far."""
    return int(xla.counter_value("UncachedCompile") or 0)


def aliased() -> int:
    """Inputs so far that a compiled graph writes in place."""
    data = xla.metric_data("InputOutputAliasCount")
    return int(data[1]) if data else 0


def fallbacks() -> list[str]:
    """Operations that XLA did not have and the host computed. Reading a result is none; nextafter
    is in the core's own sampler, in whose place the plugin has one that needs its compiler.
    """
    own = {"aten::_local_scalar_dense", "aten::nextafter"}
    return sorted({n for n in xla.counter_names() if n.startswith("aten::")} - own)


def check(name: str, model: str) -> bool:
    """One model: prints what was found."""
    with LLM(model, backend="cpu", **LIMITS) as llm:
        expected = tokens(llm)
    before = aliased()
    with LLM(model, backend="xla", **LIMITS) as llm:
        programs, layers = llm._assembled.runner.compile_count(), _layers(model)
        got = tokens(llm)  # what happens between programs is compiled on its first visit
        in_place, count = aliased() - before, compiled()
        again = tokens(llm)
    new = compiled() - count
    equal = sum(a == b == c for a, b, c in zip(expected, got, again, strict=True))
    wanted = programs * 2 * layers
    host = fallbacks()
    print(
        f"{name:<10} tokens equal {equal}/{len(PROMPTS)}, programs {programs}, compiled in service "
        f"{new}, KV tensors written in place {in_place} of {wanted}, left to the host: "
        f"{', '.join(host) or 'nothing'}",
        flush=True,
    )
    return equal == len(PROMPTS) and new == 0 and in_place >= wanted and not host


def _layers(model: str) -> int:
    config = json.loads((find_model(model) / "config.json").read_text())
    return int(config["num_hidden_layers"])


def main() -> int:
    """All models."""
    print(f"torch_xla {torch_xla.__version__} on {torch_xla.device()}")
    good = [check("demo", "demo")]
    with tempfile.TemporaryDirectory() as folder:
        for family, config in FAMILIES.items():
            path = Path(folder) / family
            write_model(path, config)
            good.append(check(family, str(path)))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
