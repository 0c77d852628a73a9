"""`torch.ops.hpu`: fused operators, computed in plain fp32 torch.

Names, order and meaning of arguments as vllm-gaudi 091bbadd calls them. fp8 here is e4m3fn bytes;
on Gaudi 2 the range ends at 240: larger values saturate when made and are NaN when read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from simdevice import VendorRefuses

_SCHEMAS = (
    "mixture_of_experts(Tensor hidden_states, Tensor expert_routing_table, "
    "Tensor router_weights, Tensor[] w12, Tensor[] w3, bool permuted_weights, str activation, "
    "int experts_min, int experts_max) -> Tensor",
    "block_softmax(Tensor attn, Tensor bias, Tensor groups) -> (Tensor, Tensor, Tensor)",
    "block_softmax_adjustment(Tensor block_max, Tensor block_sums, Tensor groups, "
    "int batch_size, int[] out_shape) -> Tensor",
    "cast_to_fp8_v2(Tensor input, Tensor? scale=None, bool stochastic_rounding=False, "
    "bool is_amax=False, ScalarType? dtype=None) -> (Tensor, Tensor)",
    "cast_from_fp8(Tensor input, Tensor? scale, ScalarType out_dtype) -> Tensor",
    "fp8_gemm_v2(Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, "
    "ScalarType out_dtype, Tensor? A_scale_inv=None, Tensor? B_scale_inv=None, "
    "Tensor? bias=None, bool accumulate=False) -> Tensor",
    "convert_from_uint4(Tensor input, Tensor scale, Tensor? zero_point, ScalarType out_dtype) "
    "-> Tensor",
)
_library = torch.library.Library("hpu", "DEF")
FP8 = torch.float8_e4m3fn


def register() -> None:
    """Defines the operators; once."""
    for schema in _SCHEMAS:
        name = schema.split("(", 1)[0]
        _library.define(schema)
        _library.impl(name, globals()[name], "CompositeImplicitAutograd")


def fp8_max() -> float:
    """The largest e4m3 value: 240 on Gaudi 2, 448 on Gaudi 3."""
    return 448.0 if os.environ.get("SIMDEVICE_GAUDI", "2") == "3" else 240.0


def _from_fp8(x: torch.Tensor) -> torch.Tensor:
    """fp32 values as the device reads the bytes."""
    if x.dtype != FP8:
        raise VendorRefuses(f"an fp8 operator takes {FP8}, not {x.dtype}")
    wide = x.to(torch.float32)
    return torch.where(wide.abs() > fp8_max(), float("nan"), wide)


def cast_to_fp8_v2(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    stochastic_rounding: bool = False,
    is_amax: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input * scale rounded to fp8 and saturated, the largest magnitude of input if is_amax)."""
    if dtype != FP8 or stochastic_rounding:
        raise VendorRefuses(f"cast_to_fp8_v2 to {dtype}, stochastic={stochastic_rounding}")
    wide = input.float() if scale is None else input.float() * scale.float()
    amax = input.float().abs().amax() if is_amax else torch.zeros(1, device=input.device)
    return wide.clamp(-fp8_max(), fp8_max()).to(FP8), amax


def cast_from_fp8(
    input: torch.Tensor, scale: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """input * scale in out_dtype."""
    wide = _from_fp8(input)
    return (wide if scale is None else wide * scale.float()).to(out_dtype)


def fp8_gemm_v2(
    A: torch.Tensor,
    trans_A: bool,
    B: torch.Tensor,
    trans_B: bool,
    D: torch.Tensor | None,
    out_dtype: torch.dtype,
    A_scale_inv: torch.Tensor | None = None,
    B_scale_inv: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """A @ B * A_scale_inv * B_scale_inv + bias; scales are 0-dim, [1], [rows, 1] or [columns]."""
    if D is not None or accumulate:
        raise VendorRefuses("fp8_gemm_v2 with D or accumulate is not used in inference")
    left, right = _from_fp8(A), _from_fp8(B)
    out = (left.mT if trans_A else left) @ (right.mT if trans_B else right)
    for scale in (A_scale_inv, B_scale_inv):
        out = out if scale is None else out * scale.float()
    out = out if bias is None else out + bias.float()
    return out.to(out_dtype)


def mixture_of_experts(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    w12: Sequence[torch.Tensor],
    w3: Sequence[torch.Tensor],
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(act(gate) * up); hidden_states [tokens, hidden].

    w12[e] [2 * inner, hidden] (gate then up) and w3[e] [hidden, inner] with permuted_weights,
    else transposed. Ids outside [experts_min, experts_max] belong to other ranks and are left out.
    """
    if len(w12) != experts_max - experts_min + 1 or len(w3) != len(w12):
        raise VendorRefuses(
            f"mixture_of_experts: {len(w12)} and {len(w3)} weights for experts "
            f"{experts_min} to {experts_max}"
        )
    if hidden_states.dim() != 2 or hidden_states.dtype != router_weights.dtype:
        raise VendorRefuses("mixture_of_experts takes [tokens, hidden] and weights of its dtype")
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    if activation not in act:
        raise VendorRefuses(f"mixture_of_experts: activation {activation!r}")
    x = hidden_states.float()
    out = torch.zeros_like(x)
    for i, (gate_up, down) in enumerate(zip(w12, w3, strict=True)):
        chosen = expert_routing_table == experts_min + i
        weight = torch.where(chosen, router_weights.float(), 0.0).sum(-1, keepdim=True)
        first = gate_up.float().mT if permuted_weights else gate_up.float()
        gate, up = (x @ first).chunk(2, -1)
        last = down.float().mT if permuted_weights else down.float()
        out = out + weight * ((act[activation](gate) * up) @ last)
    return out.to(hidden_states.dtype)


def block_softmax(
    attn: torch.Tensor, bias: torch.Tensor, groups: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(exp(attn + bias - max), max, sum) of each block's last axis; attn has 5 dimensions."""
    if attn.dim() != 5:
        raise VendorRefuses(f"block_softmax takes 5 dimensions, not {attn.dim()}")
    wide = bias.float().view(*bias.shape[:1], *([1] * (5 - bias.dim())), *bias.shape[1:])
    scores = attn.float() + wide
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    return weights.to(attn.dtype), highest.to(attn.dtype), total.to(attn.dtype)


def block_softmax_adjustment(
    block_max: torch.Tensor,
    block_sums: torch.Tensor,
    groups: torch.Tensor,
    batch_size: int,
    out_shape: Sequence[int],
) -> torch.Tensor:
    """exp(max - max of the group) / sum of the group, by block; group -1 is padding and gives 0.

    block_max, block_sums [blocks, heads..., 1, 1]; groups [blocks] int; gives `out_shape`.
    """
    blocks = groups.shape[0]
    highest, total = block_max.float().view(blocks, -1), block_sums.float().view(blocks, -1)
    member = groups[:, None] == torch.arange(batch_size, device=groups.device)[None]
    spread = torch.where(member[:, :, None], highest[:, None], float("-inf"))
    own = torch.where(member[:, :, None], spread.amax(0)[None], 0.0).sum(1)
    live = member.any(1)[:, None]
    scale = torch.where(live, torch.exp(highest - own), 0.0)
    group_total = torch.where(member[:, :, None], (scale * total)[:, None], 0.0).sum(0)
    own_total = torch.where(member[:, :, None], group_total[None], 0.0).sum(1)
    adjusted = torch.where(live, scale / torch.maximum(own_total, scale * total), 0.0)
    shape = (*out_shape, *([1] * (block_max.dim() - len(out_shape))))
    return adjusted.view(shape).to(block_max.dtype)


def convert_from_uint4(
    input: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """(nibbles - zero points) * scale, [in, out]; input int32 [in, out / 8], low nibble first.

    scale [groups, out], zero_point int32 [groups, out / 8]; a group is in / groups rows.
    """
    shifts = torch.arange(0, 32, 4, device=input.device, dtype=torch.int32)

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return ((packed[..., None] >> shifts) & 15).flatten(-2).float()

    values = unpack(input)
    rows = values.shape[0] // scale.shape[0]
    zeros = 0.0 if zero_point is None else unpack(zero_point).repeat_interleave(rows, 0)
    return ((values - zeros) * scale.float().repeat_interleave(rows, 0)).to(out_dtype)
