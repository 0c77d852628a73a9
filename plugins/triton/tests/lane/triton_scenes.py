"""The launches that are compiled ahead of time: ops called on meta tensors of real models' shapes.

A meta tensor has no values, so an op that would look at one fails here.
"""

from __future__ import annotations

from functools import partial

import torch

from tokenry.backend.base import SampleInputs, StepBatch
from tokenry.backend.contract import Bucket
from tokenry_triton.launch import arch_of
from tokenry_triton.ops import triton_ops

FEW = {"sm_100", "gfx90a"}
"""Architectures for which only HOT is compiled: for the others the rest tells the same."""
HOT = {
    "norm", "decode 128", "split decode 128", "prefill 128", "prefill 64 sinks", "greedy",
    "linear int8 few", "linear int4 many", "linear fp8 many", "moe few", "moe many",
}  # fmt: skip


def meta(*shape, dtype=torch.bfloat16):
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scenes(target):
    """Scene name -> a call that launches kernels, for a compiler target."""
    arch = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    ops = triton_ops(arch)
    fp8 = arch_of(arch).fp8
    found = {**rows(ops), **attention(ops, fp8), **sample(ops), **products(ops, fp8)}
    return {name: call for name, call in found.items() if arch not in FEW or name in HOT}


def rows(ops):
    """Llama-3.1-8B's rows."""
    q, k = meta(64, 48, 128).split_with_sizes((40, 8), 1)
    table = meta(8192, 2, 64, dtype=torch.float32)
    positions = meta(64, dtype=torch.int32)
    x = meta(64, 4096)
    return {
        "norm": partial(ops["rms_norm"], x, meta(4096), 1e-5, x),
        "rope": partial(ops["rope"], q, k, positions, table),
        "silu": partial(ops["act_mul"], meta(64, 28672), "silu"),
        "gelu_tanh": partial(ops["act_mul"], meta(64, 28672), "gelu_tanh"),
    }


def batch(phase, tokens, seqs, blocks):
    """A batch with a block table of so many blocks."""
    bucket = Bucket(phase=phase, seqs=seqs, tokens=tokens, kv_blocks=blocks)
    sizes = {
        "token_ids": (tokens,), "positions": (tokens,), "slots": (tokens,), "q_start": (seqs + 1,),
        "q_lens": (seqs,), "seq_lens": (seqs,), "block_table": (seqs, blocks),
        "logit_rows": (seqs,),
    }  # fmt: skip
    parts = {name: meta(*shape, dtype=torch.int32) for name, shape in sizes.items()}
    return StepBatch(bucket=bucket, extra={}, **parts)


def attention(ops, fp8):
    """Decode, split decode and prefill of Llama-3.1-8B, Qwen3-like 64-wide heads, Gemma-2, and
    GPT-OSS's layers with sinks.
    """

    def call(phase, tokens, seqs, blocks, heads, kv_heads, dim, kv="bfloat16", **rule):
        q, k = meta(tokens, heads + kv_heads, dim).split_with_sizes((heads, kv_heads), 1)
        kv = meta(2, 1000, 16, kv_heads, dim, dtype=getattr(torch, kv))
        if rule.get("sinks"):
            rule["sinks"] = meta(heads)
        if rule.get("kv_scales"):
            rule["kv_scales"] = meta(2, kv_heads, dtype=torch.float32)
        ops["attention"](q, k, k, kv, batch(phase, tokens, seqs, blocks), scale=0.1, **rule)

    gemma = {"window": 4096, "softcap": 50.0}
    found = {
        "decode 128": partial(call, "decode", 64, 64, 32, 32, 8, 128),
        "split decode 128": partial(call, "decode", 64, 64, 512, 32, 8, 128),
        "prefill 128": partial(call, "prefill", 2048, 4, 512, 32, 8, 128),
        "decode 64": partial(call, "decode", 64, 64, 32, 14, 2, 64),
        "prefill 64": partial(call, "prefill", 2048, 4, 512, 14, 2, 64),
        "decode 256 window softcap": partial(call, "decode", 64, 64, 32, 8, 4, 256, **gemma),
        "prefill 256 window softcap": partial(call, "prefill", 2048, 4, 512, 8, 4, 256, **gemma),
    }
    oss = {"window": 128, "sinks": True}
    found["split decode 64 sinks"] = partial(call, "decode", 64, 64, 512, 64, 8, 64, **oss)
    found["prefill 64 sinks"] = partial(call, "prefill", 2048, 4, 512, 64, 8, 64, **oss)
    if fp8:
        found["decode 128 fp8 kv scaled"] = partial(
            call, "decode", 64, 64, 512, 32, 8, 128, fp8, kv_scales=True
        )
    return found


def sample(ops):
    """Greedy, plain and filtered draws of Llama 3's vocabulary."""
    wide = meta(64, dtype=torch.float32)
    whole = meta(64, dtype=torch.int32)
    logits = meta(64, 128256, dtype=torch.float32)

    def call(**flags):
        given = SampleInputs(
            temperature=wide, top_k=whole, top_p=wide, min_p=wide, uniform=wide, **flags
        )
        ops["sample"](logits, given)

    return {
        "greedy": partial(call, all_greedy=True),
        "draw": partial(call, any_filter=False),
        "filtered draw": call,
    }


def products(ops, fp8):
    """Narrow linears of Llama-3.1-8B, with few rows and with many; experts of Qwen3-30B-A3B."""
    linear, moe = ops["linear"], ops["moe"]

    def call(format, rows):
        linear(meta(rows, 4096), linear.quantize({"weight": meta(6144, 4096)}, format))

    def mixture(format, rows):
        weights = {"w13": meta(128, 1536, 2048), "w2": meta(128, 2048, 768)}
        packed = moe.pack(weights) if format is None else moe.quantize(weights, format)
        rule = {"top_k": 8, "renormalize": True, "kind": "silu"}
        moe(meta(rows, 2048), meta(rows, 128), packed, **rule)

    many = {"few": 8, "many": 2048}
    found = {
        f"linear {format} {few}": partial(call, format, rows)
        for format in ("int8", "int4", *(["fp8"] if fp8 else []))
        for few, rows in many.items()
    }
    found["moe few"] = partial(mixture, None, 16)
    found["moe many"] = partial(mixture, None, 4096)
    if fp8:
        found["moe fp8 few"] = partial(mixture, "fp8", 16)
    found["moe int4 few"] = partial(mixture, "int4", 16)
    return found
