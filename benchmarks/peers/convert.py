"""The benchmark's Llama-shaped checkpoint in the formats of the peers.

    python benchmarks/peers/convert.py gguf MODEL [LLAMA_BIN]  # with the tools int8, int4 too
    python benchmarks/peers/convert.py openvino MODEL             # fp32, int8, int4

`gguf` needs the gguf package, `openvino` optimum-intel: run each by the Python that has it. Files
are written into MODEL. llama.cpp turns neighbouring pairs where transformers turns halves, so
rows of q and k are put in its order (the format is in ggml's docs/gguf.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """A checkpoint's tensor name as GGUF has it."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return whole[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def pairs(weight: Any, heads: int) -> Any:
    """Rows [heads * D, E] from halves to neighbouring pairs."""
    out, inner = weight.shape
    halves = weight.reshape(heads, 2, out // heads // 2, inner)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(out, inner))


def to_gguf(model: Path, kind: str) -> Path:
    """Write MODEL/<kind>.gguf; kind is fp32 or bf16."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    path = model / f"{kind}.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, tensor in load_file(model / "model.safetensors").items():
        weight = tensor.astype(np.float32)
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                weight = pairs(weight, config[heads])
        if kind == "bf16" and weight.ndim == 2:
            as_bf16 = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(gguf_name(name), as_bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def main(kind: str, model: Path, *tools: str) -> None:
    """All precisions of one format."""
    if kind == "gguf":
        whole = to_gguf(model, "fp32")
        to_gguf(model, "bf16")
        for precision, ggml in (("int8", "Q8_0"), ("int4", "Q4_0")):
            if tools:
                command = [f"{tools[0]}/llama-quantize", "--pure", str(whole)]
                subprocess.run([*command, str(model / f"{precision}.gguf"), ggml], check=True)
        return
    for precision in ("fp32", "int8", "int4"):
        extra = ["--sym", "--ratio", "1.0", "--group-size", "128"] if precision == "int4" else []
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        command += ["-m", str(model), "--task", "text-generation-with-past"]
        command += ["--weight-format", precision, *extra, str(model / f"openvino-{precision}")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
