"""AITER as attention of the ROCm backend: `--backend-option attention=aiter`.

Its `unified_attention` takes the paged KV and the batch as they are, in all phases (github.com/
ROCm/aiter, aiter/ops/triton; vLLM calls the same). **Never run with the real library**: the tests
have a stand-in that refuses what its checks refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from tokenry.backend.base import Op, StepBatch
from tokenry.errors import ConfigError
from tokenry_triton.gpu.providers import Launch, MakeProvider, Provided, Rule, WriteKV, fits_halves

PLACES = ("aiter.ops.triton.attention.unified_attention", "aiter.ops.triton.unified_attention")
"""Where newer and older releases have it."""
ARCHS = ("gfx942", "gfx950")


class Aiter(Provided):
    """All phases, sinks and soft cap too."""

    def __init__(self, attention: Callable[..., None], own: Op, write: WriteKV) -> None:
        super().__init__("AITER", own, write)
        self._attention = attention

    def can(self, launch: Launch) -> bool:
        """float16 and bfloat16."""
        return fits_halves(launch)

    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, *, decode: bool
    ) -> Tensor:
        """As `Provided.attend`."""
        out = torch.zeros_like(q)
        self._attention(
            q=q, k=kv_layer[0], v=kv_layer[1], out=out, cu_seqlens_q=batch.q_start,
            max_seqlen_q=1 if decode else batch.bucket.tokens, seqused_k=batch.seq_lens,
            max_seqlen_k=rule.width, softmax_scale=rule.scale, causal=True,
            window_size=(rule.left, -1 if rule.left < 0 else 0), block_table=batch.block_table,
            softcap=rule.softcap or 0.0, q_descale=None, k_descale=None, v_descale=None,
            sinks=rule.sinks,
        )  # fmt: skip
        return out


def aiter(arch: str, own: Op, write: WriteKV) -> Provided:
    """AITER's, for the architectures that it is made for."""
    if arch not in ARCHS:
        raise ConfigError(
            f"--backend-option attention=aiter: AITER is for {', '.join(ARCHS)}; this is {arch}.",
            mend="leave attention out",
        )
    if find_spec("aiter") is None:
        raise ConfigError(
            "--backend-option attention=aiter: aiter is not installed.",
            mend="install it from github.com/ROCm/aiter, or leave attention out",
        )
    return Aiter(_unified(), own, write)


def _unified() -> Callable[..., None]:
    for place in PLACES:
        try:
            found: Callable[..., None] = import_module(place).unified_attention
        except ModuleNotFoundError:
            continue
        return found
    raise ConfigError(
        f"--backend-option attention=aiter: the installed aiter has none of {', '.join(PLACES)}.",
        mend="another release of aiter, or leave attention out",
    )


PROVIDERS: Mapping[str, MakeProvider] = {"aiter": aiter}
