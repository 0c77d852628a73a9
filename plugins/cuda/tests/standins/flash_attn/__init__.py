"""A stand-in of FlashAttention 2's package: the two functions that are used."""

from __future__ import annotations

import torch
from standin_paged import CALLS, attend, check_host, check_kv, check_lens, check_rule, refuse


def _check_page(cache):
    refuse(cache.shape[1] % 256 != 0, "Paged KV cache block size must be divisible by 256")


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """One row a request."""
    check_kv(q, k_cache, v_cache, block_table)
    _check_page(k_cache)
    check_rule(softmax_scale, causal, window_size, softcap)
    size = len(block_table)
    refuse(q.ndim != 4 or q.shape[:2] != (size, 1), f"q {tuple(q.shape)}")
    check_lens(cache_seqlens, size, "cache_seqlens")
    CALLS["decode"] += 1
    starts = torch.arange(size + 1, device=q.device, dtype=torch.int32)
    out = attend(
        q[:, 0], k_cache, v_cache, block_table, cache_seqlens, starts, scale=softmax_scale,
        window=window_size, softcap=softcap,
    )  # fmt: skip
    return out.view(q.shape)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """Rows of all requests, one after the other."""
    check_kv(q, k, v, block_table)
    _check_page(k)
    check_rule(softmax_scale, causal, window_size, softcap)
    size = len(block_table)
    refuse(q.ndim != 3, f"q {tuple(q.shape)}")
    check_lens(cu_seqlens_q, size + 1, "cu_seqlens_q")
    check_lens(cu_seqlens_k, size + 1, "cu_seqlens_k")
    check_host(max_seqlen_q, "max_seqlen_q", 1)
    check_host(max_seqlen_k, "max_seqlen_k", block_table.shape[1] * k.shape[1])
    CALLS["varlen"] += 1
    return attend(
        q, k, v, block_table, cu_seqlens_k.diff().to(torch.int32), cu_seqlens_q,
        scale=softmax_scale, window=window_size, softcap=softcap,
    )  # fmt: skip
