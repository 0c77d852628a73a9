"""Rotary position tables, with every scaling that published checkpoints use.

In: rope parameters of a config, named as in transformers 5. Out: [max_len, 2, rot / 2]
float32, cos and sin, for the `rope` op. Formulas: RoPE arXiv 2104.09864, dynamic NTK and YaRN arXiv
2309.00071, LongRoPE arXiv 2402.13753, Llama 3.1's from its reference code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenry.errors import ModelLoadError


def rope_table(
    parameters: Mapping[str, Any], *, head_dim: int, max_len: int, trained_len: int
) -> Tensor:
    """[max_len, 2, rot / 2] float32.

    trained_len   the config's max_position_embeddings
    max_len       how many positions are served; longrope and dynamic choose their frequencies by
                  it, once, so that a token's KV does not depend on the request's length
                  (transformers recomputes them as the text grows, which no KV cache survives)

    Raises ModelLoadError for an unknown rope_type or a parameter that it lacks.
    """
    try:
        return _table(parameters, head_dim, max_len, trained_len)
    except KeyError as error:
        raise ModelLoadError(
            f"The rope scaling {parameters.get('rope_type')!r} of config.json lacks "
            f"{error.args[0]!r}.",
            mend="add it, or download config.json again",
        ) from error


def _table(parameters: Mapping[str, Any], head_dim: int, max_len: int, trained_len: int) -> Tensor:
    rot = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    kind = parameters.get("rope_type", "default")
    base = float(parameters["rope_theta"])
    exponent = torch.arange(0, rot, 2, dtype=torch.float32) / rot
    frequency, scale = 1.0 / base**exponent, 1.0
    if kind == "linear":
        frequency = frequency / parameters["factor"]
    elif kind == "dynamic":
        length = max(max_len, trained_len)
        stretch = parameters["factor"] * length / trained_len - (parameters["factor"] - 1)
        frequency = 1.0 / (base * stretch ** (rot / (rot - 2))) ** exponent
    elif kind == "llama3":
        frequency = _llama3(frequency, parameters)
    elif kind == "yarn":
        frequency, scale = _yarn(frequency, parameters, base, rot, trained_len)
    elif kind == "longrope":
        frequency, scale = _longrope(exponent, parameters, base, max_len, trained_len)
    elif kind != "default":
        raise ModelLoadError(
            f"rope_type {kind!r} of config.json is not known; known: default, linear, dynamic, "
            "llama3, yarn, longrope.",
            mend="remove the scaling, and stay within the length the model was trained with",
        )
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos() * scale, angle.sin() * scale), dim=1)


def _llama3(frequency: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths divided by factor, short ones kept, a linear blend between."""
    turns = p["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = frequency * (blend + (1 - blend) / p["factor"])
    return scaled


def _yarn(
    frequency: Tensor, p: Mapping[str, Any], base: float, rot: int, trained_len: int
) -> tuple[Tensor, float]:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or trained_len / original

    def magnitude(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    def dim_of(turns: float) -> float:
        return rot * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(p.get("beta_fast") or 32), dim_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rot - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rot // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    scale = p.get("attention_factor")
    if scale is None:
        m, m_all = p.get("mscale"), p.get("mscale_all_dim")
        scale = magnitude(m) / magnitude(m_all) if m and m_all else magnitude(1.0)
    return frequency / factor * ramp + frequency * (1 - ramp), float(scale)


def _longrope(
    exponent: Tensor, p: Mapping[str, Any], base: float, max_len: int, trained_len: int
) -> tuple[Tensor, float]:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or trained_len / original
    scale = p.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    divisors = p["long_factor"] if max_len > original else p["short_factor"]
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * base**exponent), float(scale)
