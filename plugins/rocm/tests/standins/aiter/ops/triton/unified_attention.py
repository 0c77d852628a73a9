"""A stand-in of AITER's unified attention: it writes into `out`, and where no row is, nothing."""

from __future__ import annotations

import torch
from standin_paged import CALLS, attend, check_host, check_kv, check_lens, check_rule, refuse


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale, k_descale, v_descale, alibi_slopes=None,
    output_scale=None, qq_bias=None, sinks=None,
):  # fmt: skip
    """All phases."""
    check_kv(q, k, v, block_table)
    check_rule(softmax_scale, causal, window_size, softcap)
    size = len(block_table)
    refuse(q.ndim != 3 or out.shape != q.shape, f"q {tuple(q.shape)}, out {tuple(out.shape)}")
    refuse(out.dtype != q.dtype or not out.is_contiguous(), f"out is {out.dtype}")
    refuse(q_descale is not None, "Q scales not supported")
    refuse(sinks is not None and sinks.shape[0] != q.shape[1], "Sinks must be num_query_heads size")
    check_lens(cu_seqlens_q, size + 1, "cu_seqlens_q")
    check_lens(seqused_k, size, "seqused_k")
    check_host(max_seqlen_q, "max_seqlen_q", 1)
    check_host(max_seqlen_k, "max_seqlen_k", block_table.shape[1] * k.shape[1])
    CALLS["decode" if max_seqlen_q == 1 else "varlen"] += 1
    found = attend(
        q, k, v, block_table, seqused_k, cu_seqlens_q, scale=softmax_scale, window=window_size,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    rows = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    out.copy_(torch.where((rows < cu_seqlens_q[-1])[:, None, None], found, out))
