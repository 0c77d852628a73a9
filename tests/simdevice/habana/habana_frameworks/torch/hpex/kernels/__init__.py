"""Fused kernels in plain fp32 torch; shapes and order of arguments as vllm-gaudi calls them."""

from __future__ import annotations

import enum

import torch
from simdevice import VendorRefuses


def _refuse_if(condition: bool, text: str) -> None:
    if condition:
        raise VendorRefuses(text)


class FusedSDPA(torch.autograd.Function):
    """Scaled dot product attention with grouped heads; inference only."""

    @staticmethod
    def forward(
        ctx: object,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute_mode: bool | None = None,
        valid_sequence_lengths: torch.Tensor | None = None,
        padding_side: str = "left",
        in_slicing: bool = False,
        out_slicing: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[batch, heads, q_len, head_dim] of `query`'s dtype; keys and values have heads / n heads.

        attn_mask is bool (True = keep) or added in the scores' dtype, broadcast to [batch, heads,
        q_len, k_len]. valid_sequence_lengths int32 [batch] goes with is_causal. window_size (left,
        right), -1 = open. Rows with nothing to attend to are NaN, except those outside
        valid_sequence_lengths (0).
        """
        _check_sdpa(query, key, value, attn_mask, dropout_p, is_causal, softmax_mode, padding_side)
        q_len, k_len = query.shape[2], key.shape[2]
        groups = query.shape[1] // key.shape[1]
        scores = query.float() @ key.float().repeat_interleave(groups, 1).transpose(2, 3)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        rows = torch.arange(q_len, device=query.device)[:, None] + (k_len - q_len)
        columns = torch.arange(k_len, device=query.device)[None]
        allowed = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device)
        if is_causal:
            allowed = allowed & (columns <= rows)
        left, right = window_size
        if left >= 0:
            allowed = allowed & (columns >= rows - left)
        if right >= 0:
            allowed = allowed & (columns <= rows + right)
        live = None
        if valid_sequence_lengths is not None:
            _refuse_if(not is_causal, "valid_sequence_lengths goes with is_causal")
            _refuse_if(
                valid_sequence_lengths.dtype != torch.int32, "valid_sequence_lengths is int32"
            )
            lengths = valid_sequence_lengths[:, None]
            live = columns < lengths if padding_side == "right" else columns >= k_len - lengths
            allowed = allowed[None, None] & live[:, None, None, :]
        scores = scores.masked_fill(~allowed, float("-inf"))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask.float()
        out = _softmax_values(scores, value.float().repeat_interleave(groups, 1), sinks)
        if live is not None:
            out = torch.where(live[:, None, -q_len:, None], out, 0.0)
        return out.to(query.dtype)


def _softmax_values(
    scores: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    if sinks is None:
        return torch.softmax(scores, -1) @ values
    sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1] @ values


def _check_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    softmax_mode: str,
    padding_side: str,
) -> None:
    dims = {query.dim(), key.dim(), value.dim()}
    _refuse_if(dims != {4}, f"FusedSDPA takes 4 dimensions, not {sorted(dims)}")
    _refuse_if(
        not query.dtype == key.dtype == value.dtype,
        f"FusedSDPA takes one dtype, not {query.dtype}, {key.dtype} and {value.dtype}",
    )
    _refuse_if(
        query.shape[1] % key.shape[1] != 0 or key.shape[1] != value.shape[1],
        f"FusedSDPA: {query.shape[1]} query heads on {key.shape[1]} and {value.shape[1]} heads",
    )
    _refuse_if(dropout_p != 0.0, f"FusedSDPA: dropout {dropout_p} in inference")
    _refuse_if(
        is_causal and attn_mask is not None, "FusedSDPA: is_causal together with a mask is not used"
    )
    _refuse_if(
        is_causal and query.shape[2] != key.shape[2],
        f"FusedSDPA: is_causal with {query.shape[2]} queries and {key.shape[2]} keys is ambiguous",
    )
    _refuse_if(
        softmax_mode not in ("None", "fast", "fp32"), f"FusedSDPA: softmax mode {softmax_mode!r}"
    )
    _refuse_if(padding_side not in ("left", "right"), f"FusedSDPA: padding side {padding_side!r}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
        _refuse_if(
            attn_mask.dtype != query.dtype,
            f"FusedSDPA: a mask of {attn_mask.dtype} for {query.dtype}",
        )


class RotaryPosEmbeddingMode(enum.Enum):
    """How a head's halves are paired."""

    BLOCKWISE = 0
    PAIRWISE = 1


def apply_rotary_pos_emb(
    p: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    offset: int = 0,
    mode: RotaryPosEmbeddingMode = RotaryPosEmbeddingMode.BLOCKWISE,
) -> torch.Tensor:
    """`p` rotated: p * cos + rotate(p) * sin, in `p`'s dtype.

    cos, sin broadcast to `p` ([..., head_dim], one dtype), or with position_ids [batch, tokens] are
    tables [positions, head_dim] for `p` [batch, heads, tokens, head_dim]. BLOCKWISE pairs i with i
    + head_dim / 2, PAIRWISE 2i with 2i + 1.
    """
    _refuse_if(
        not p.dtype == cos.dtype == sin.dtype,
        f"apply_rotary_pos_emb takes one dtype, not {p.dtype}, {cos.dtype} and {sin.dtype}",
    )
    _refuse_if(offset != 0, "apply_rotary_pos_emb: an offset is not used")
    _refuse_if(cos.shape[-1] != p.shape[-1], "apply_rotary_pos_emb: cos is as wide as the head")
    if position_ids is not None:
        cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    x = p.float()
    if mode is RotaryPosEmbeddingMode.BLOCKWISE:
        first, second = x.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
    else:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * cos.float() + rotated * sin.float()).to(p.dtype)


class RotaryPosEmbeddingHelperV2(torch.autograd.Function):
    """The form that optimum-habana calls: tables of shape [1, 1, positions, head_dim]."""

    @staticmethod
    def forward(
        ctx: object,
        p: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """As `apply_rotary_pos_emb`, BLOCKWISE, with position_ids."""
        _refuse_if(cos.dim() != 4, "RotaryPosEmbeddingHelperV2 takes tables of 4 dimensions")
        return apply_rotary_pos_emb(p, cos[0, 0], sin[0, 0], position_ids)
