"""Fused normalization, computed in plain fp32 torch."""

from __future__ import annotations

import torch
from simdevice import VendorRefuses


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis."""

    @staticmethod
    def forward(
        ctx: object,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        use_stages: bool = True,
        bwd_mode: int = 0,
        fast_math: bool = False,
    ) -> torch.Tensor:
        """Gives `x`'s shape and dtype. `x` has 3 dimensions or more: vllm-gaudi's note."""
        if x.dtype != weight.dtype:
            raise VendorRefuses(f"FusedRMSNorm takes one dtype, not {x.dtype} and {weight.dtype}")
        if x.dim() < 3:
            raise VendorRefuses(f"FusedRMSNorm takes 3 dimensions or more, not {x.dim()}")
        if weight.shape != x.shape[-1:]:
            raise VendorRefuses(f"FusedRMSNorm: weight {tuple(weight.shape)} for {tuple(x.shape)}")
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)
