"""A stand-in of flashinfer.decode: the plan-free decode, as its xqa backend takes it."""

from __future__ import annotations

import torch
from standin_paged import CALLS, attend, check_host, check_kv, check_lens, refuse

_clean = set()


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale=1.0,
    bmm2_scale=1.0, window_left=-1, out=None, out_dtype=None, o_sf_scale=None, o_sf_vec_size=None,
    sinks=None, kv_layout="HND", enable_pdl=None, backend="auto", q_len_per_req=1, o_scale=1.0,
    mask=None, max_q_len=None, cum_seq_lens_q=None,
):  # fmt: skip
    """One row a request; every request has a key."""
    refuse(type(kv_cache) is not tuple or len(kv_cache) != 2, "kv_cache is no pair")
    refuse(kv_layout != "NHD", f"{kv_layout} with pages of [page, heads, dim]")
    k, v = kv_cache
    check_kv(query, k, v, block_tables)
    refuse(k.shape[1] not in (16, 32, 64, 128), f"pages of {k.shape[1]}")
    refuse(query.shape[-1] not in (64, 128, 256), f"head dim {query.shape[-1]}")
    refuse(query.ndim != 3 or len(query) != len(block_tables), f"query {tuple(query.shape)}")
    refuse(not query.is_contiguous(), "query is not contiguous")
    refuse(workspace_buffer.dtype != torch.uint8, f"workspace is {workspace_buffer.dtype}")
    refuse(workspace_buffer.numel() < 16 << 20, "a workspace of less than 8 MiB and scratch")
    if workspace_buffer.data_ptr() not in _clean:  # its first use
        refuse(bool(workspace_buffer.any()), "the workspace is not 0 at first use")
        _clean.add(workspace_buffer.data_ptr())
    check_lens(seq_lens, len(block_tables), "seq_lens")
    check_host(max_seq_len, "max_seq_len", block_tables.shape[1] * k.shape[1])
    refuse(type(bmm1_scale) is not float or bmm2_scale != 1.0, "scales")
    refuse(type(window_left) is not int, f"window {window_left!r}")
    CALLS["decode"] += 1
    starts = torch.arange(len(query) + 1, device=query.device, dtype=torch.int32)
    lens = torch.where(seq_lens > 0, seq_lens, -(2**20))  # a request without a key is nonsense
    return attend(
        query, k, v, block_tables, lens, starts, scale=bmm1_scale, window=(window_left, 0)
    )  # fmt: skip
