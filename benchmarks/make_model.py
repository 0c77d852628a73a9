"""Write a Llama-shaped model with random weights, for benchmarks that need a size and not a text.

    python benchmarks/make_model.py DIR [--hidden 768 --layers 12 --heads 12 --kv-heads 4 --mlp 2048
    --vocab 32000]

The defaults have 125 M parameters (the shape of the peer table: untied embeddings, fp32). The
tokenizer is the demo model's, with a made-up text for each further id.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tokenry.hub import find_model


def weights(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random float32 tensors by checkpoint name, scaled so that activations stay of order one."""
    rng = np.random.default_rng(0)
    head_dim = args.hidden // args.heads

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    tensors = {
        "model.embed_tokens.weight": normal(args.vocab, args.hidden),
        "model.norm.weight": np.ones(args.hidden, np.float32),
        "lm_head.weight": normal(args.vocab, args.hidden),
    }
    for i in range(args.layers):
        at = f"model.layers.{i}."
        tensors[at + "self_attn.q_proj.weight"] = normal(args.hidden, args.hidden)
        tensors[at + "self_attn.k_proj.weight"] = normal(args.kv_heads * head_dim, args.hidden)
        tensors[at + "self_attn.v_proj.weight"] = normal(args.kv_heads * head_dim, args.hidden)
        tensors[at + "self_attn.o_proj.weight"] = normal(args.hidden, args.hidden)
        tensors[at + "mlp.gate_proj.weight"] = normal(args.mlp, args.hidden)
        tensors[at + "mlp.up_proj.weight"] = normal(args.mlp, args.hidden)
        tensors[at + "mlp.down_proj.weight"] = normal(args.hidden, args.mlp)
        tensors[at + "input_layernorm.weight"] = np.ones(args.hidden, np.float32)
        tensors[at + "post_attention_layernorm.weight"] = np.ones(args.hidden, np.float32)
    return tensors


def fill_vocabulary(path: Path, size: int) -> None:
    """A text for each id up to `size`, so that every token that is drawn shows in a stream."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    taken = len(vocabulary) + sum(t["content"] not in vocabulary for t in tokenizer["added_tokens"])
    vocabulary.update({f"t{i}": i for i in range(taken, size)})
    path.write_text(json.dumps(tokenizer))


def main() -> None:
    """Write config, weights and tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dir", type=Path)
    for name, default in (
        ("hidden", 768),
        ("layers", 12),
        ("heads", 12),
        ("kv-heads", 4),
        ("mlp", 2048),
        ("vocab", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "intermediate_size": args.mlp,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 4,
    }
    (args.dir / "config.json").write_text(json.dumps(config, indent=1))
    tensors = weights(args)
    save_file(tensors, args.dir / "model.safetensors", metadata={"format": "pt"})
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        shutil.copy(find_model("demo") / name, args.dir / name)
    fill_vocabulary(args.dir / "tokenizer.json", args.vocab)
    count = sum(t.size for t in tensors.values())
    print(f"{args.dir}: {count / 1e6:.0f} M parameters, {count * 4 / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
