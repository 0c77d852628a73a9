"""FlashAttention and FlashInfer as attention of the CUDA backend: `--backend-option attention=`.

Functions and limits as their own documentation and checks give them (github.com/Dao-AILab/
flash-attention: hopper/flash_attn_interface.py and flash_api.cpp, flash_attn_interface.py and
csrc/flash_attn/flash_api.cpp; docs.flashinfer.ai, flashinfer/decode.py). **Never run with the real
libraries**: the tests have stand-ins that refuse what those checks refuse.

FlashInfer's wrappers (BatchDecodeWithPagedKVCacheWrapper and its kin) are not used: their `plan`
wants the lengths on the host and reuses one pinned buffer, which a step that overlaps with the one
before may still be read from. Its plan-free decode takes the table and the lengths on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.backend.base import Op, StepBatch
from tokenry.errors import ConfigError
from tokenry_triton.gpu.providers import (
    Launch,
    MakeProvider,
    Provided,
    Rule,
    WriteKV,
    fits_halves,
)

FLASH2_PAGE = 256
"""FlashAttention 2 refuses pages that are no multiple of it."""
WORKSPACE = 128 << 20
"""Bytes that FlashInfer recommends; must be 0 at first use."""
INFER_PAGES = (16, 32, 64, 128)
INFER_DIMS = (64, 128, 256)
INFER_GROUP = 16
INFER_ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


class Flash3(Provided):
    """`flash_attn_interface.flash_attn_with_kvcache`: any page, all phases in one function."""

    def __init__(self, attention: Callable[..., Tensor], own: Op, write: WriteKV) -> None:
        super().__init__("FlashAttention 3", own, write)
        self._attention = attention

    def can(self, launch: Launch) -> bool:
        """float16 and bfloat16, head dims in eights up to 256."""
        return fits_halves(launch) and not launch.sinks

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, *, decode: bool
    ) -> Tensor:
        """As `Provided.attend`."""
        rows: Mapping[str, Any] = {} if decode else {
            "cu_seqlens_q": batch.q_start, "max_seqlen_q": batch.bucket.tokens,
        }  # fmt: skip
        return self._attention(
            q[:, None] if decode else q, kv_layer[0], kv_layer[1], cache_seqlens=batch.seq_lens,
            page_table=batch.block_table, softmax_scale=rule.scale, causal=True,
            window_size=(rule.left, -1 if rule.left < 0 else 0), softcap=rule.softcap or 0.0,
            **rows,
        )  # fmt: skip


class Flash2(Provided):
    """`flash_attn`: pages of 256; decode by its KV cache's function, the rest by the varlen one."""

    block_sizes = (FLASH2_PAGE,)

    def __init__(
        self,
        decode: Callable[..., Tensor],
        varlen: Callable[..., Tensor],
        own: Op,
        write: WriteKV,
    ) -> None:
        super().__init__("FlashAttention 2", own, write)
        self._decode, self._varlen = decode, varlen

    def can(self, launch: Launch) -> bool:
        """As FlashAttention 3, on its pages."""
        return fits_halves(launch) and not launch.sinks and launch.block_size % FLASH2_PAGE == 0

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, *, decode: bool
    ) -> Tensor:
        """As `Provided.attend`."""
        shared: Mapping[str, Any] = {
            "block_table": batch.block_table, "softmax_scale": rule.scale, "causal": True,
            "window_size": (rule.left, -1 if rule.left < 0 else 0), "softcap": rule.softcap or 0.0,
        }  # fmt: skip
        if decode:
            return self._decode(
                q[:, None], kv_layer[0], kv_layer[1], cache_seqlens=batch.seq_lens, **shared
            )
        ends = torch.cumsum(batch.seq_lens, 0, dtype=torch.int32)
        return self._varlen(
            q, kv_layer[0], kv_layer[1], cu_seqlens_q=batch.q_start,
            cu_seqlens_k=functional.pad(ends, (1, 0)), max_seqlen_q=batch.bucket.tokens,
            max_seqlen_k=rule.width, **shared,
        )  # fmt: skip


class FlashInfer(Provided):
    """`flashinfer.decode.trtllm_batch_decode_with_kv_cache`: decode; the rest is the own op's."""

    def __init__(self, decode: Callable[..., Tensor], own: Op, write: WriteKV) -> None:
        super().__init__("FlashInfer (decode)", own, write)
        self._decode = decode
        self._workspace: Tensor | None = None

    def can(self, launch: Launch) -> bool:
        """Decode without a soft cap, of the usual heads and pages."""
        return (
            launch.decode
            and fits_halves(launch)
            and launch.head_dim in INFER_DIMS
            and launch.block_size in INFER_PAGES
            and launch.heads // launch.kv_heads <= INFER_GROUP
            and not (launch.softcap or launch.sinks)
        )

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, *, decode: bool
    ) -> Tensor:
        """As `Provided.attend`; a padded request has one key, of the null block."""
        if self._workspace is None:  # in the first step, which is never a captured one
            self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
        return self._decode(
            query=q, kv_cache=(kv_layer[0], kv_layer[1]), workspace_buffer=self._workspace,
            block_tables=batch.block_table, seq_lens=batch.seq_lens.clamp_min(1),
            max_seq_len=rule.width, bmm1_scale=rule.scale, bmm2_scale=1.0, window_left=rule.left,
            kv_layout="NHD",
        )  # fmt: skip


def flash(arch: str, own: Op, write: WriteKV) -> Provided:
    """FlashAttention 3 where it is installed and the device is sm_90, else FlashAttention 2."""
    if arch == "sm_90" and find_spec("flash_attn_interface") is not None:
        return Flash3(import_module("flash_attn_interface").flash_attn_with_kvcache, own, write)
    if find_spec("flash_attn") is None:
        raise ConfigError(
            f"--backend-option attention=flash: neither flash_attn_interface (3, sm_90 only) nor "
            f"flash_attn (2) is installed; this is {arch}.",
            mend="pip install flash-attn, or leave attention out",
        )
    found = import_module("flash_attn")
    return Flash2(found.flash_attn_with_kvcache, found.flash_attn_varlen_func, own, write)


def flashinfer(arch: str, own: Op, write: WriteKV) -> Provided:
    """FlashInfer's decode, for the architectures that it has one for."""
    if arch not in INFER_ARCHS:
        raise ConfigError(
            f"--backend-option attention=flashinfer: its plan-free decode is for "
            f"{', '.join(INFER_ARCHS)}; this is {arch}.",
            mend="leave attention out",
        )
    if find_spec("flashinfer") is None:
        raise ConfigError(
            "--backend-option attention=flashinfer: flashinfer is not installed.",
            mend="pip install flashinfer-python, or leave attention out",
        )
    found = import_module("flashinfer.decode")
    return FlashInfer(found.trtllm_batch_decode_with_kv_cache, own, write)


PROVIDERS: Mapping[str, MakeProvider] = {"flash": flash, "flashinfer": flashinfer}
