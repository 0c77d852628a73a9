"""A stand-in of FlashAttention 3's module: the function that is used, with its whole signature."""

from __future__ import annotations

import torch
from standin_paged import CALLS, attend, check_host, check_kv, check_lens, check_rule, refuse


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """Pages of any size."""
    check_kv(q, k_cache, v_cache, page_table)
    check_rule(softmax_scale, causal, window_size, softcap)
    size = len(page_table)
    check_lens(cache_seqlens, size, "cache_seqlens")
    CALLS["decode" if cu_seqlens_q is None else "varlen"] += 1
    if cu_seqlens_q is None:
        refuse(q.ndim != 4 or q.shape[:2] != (size, 1), f"q {tuple(q.shape)}")
        starts = torch.arange(size + 1, device=q.device, dtype=torch.int32)
        flat = q[:, 0]
    else:
        refuse(q.ndim != 3, f"q {tuple(q.shape)} with cu_seqlens_q")
        check_lens(cu_seqlens_q, size + 1, "cu_seqlens_q")
        check_host(max_seqlen_q, "max_seqlen_q", 1)
        starts, flat = cu_seqlens_q, q
    out = attend(
        flat, k_cache, v_cache, page_table, cache_seqlens, starts, scale=softmax_scale,
        window=window_size, softcap=softcap,
    )  # fmt: skip
    return out.view(q.shape)
