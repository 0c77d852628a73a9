"""Which tokens are left to choose from: top-n-sigma, typical, XTC and mirostat, batched.

In: logits [R, vocab] and the rows that ask for one of these. Out: their logits with -inf for what
is left out. A row that asks for any of them has its top_k, top_p and min_p applied here, too, so
that one order holds: temperature, top_n_sigma, top_k, typical_p, top_p, min_p, XTC, mirostat. Each
row is computed along its own axis alone (cumulative sums, not sums, whose order may depend on the
number of rows), so no row's result depends on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenry.params import SamplingParams
from tokenry.runner.sampling.draw import Draw, uniforms
from tokenry.runner.sampling.upload import upload

XTC_STREAM = 0x58544331
"""Added to the seed, so that XTC's coin is another number than the one that draws the token."""


def narrows(params: SamplingParams) -> bool:
    """Whether the row's candidates are chosen here and not by the `sample` op's own filters: also
    where a watermark draws from them.
    """
    return not params.greedy and (
        params.typical_p < 1
        or params.top_n_sigma > 0
        or params.xtc_probability > 0
        or params.mirostat != 0
        or (params.watermark is not None and params.watermark.scheme == "gumbel")
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Settings of the rows as columns [r, 1]; those that a row does not ask for are neutral."""

    temperature: Tensor
    sigma: Tensor
    top_k: Tensor
    typical: Tensor
    top_p: Tensor
    min_p: Tensor
    xtc: Tensor
    mu: Tensor

    @staticmethod
    def of(draws: Sequence[Draw], device: torch.device) -> _Rows:
        """As the draws ask; `xtc` is the threshold for the rows whose coin fell, 2 for others."""
        coins = uniforms([d.seed + XTC_STREAM for d in draws], [d.position for d in draws])
        table = np.array([_settings(d, float(u)) for d, u in zip(draws, coins, strict=True)])
        columns = upload(table.astype(np.float32), device)
        return _Rows(*(columns[:, i, None] for i in range(table.shape[1])))


def _settings(draw: Draw, coin: float) -> tuple[float, ...]:
    p = draw.params
    return (
        p.temperature,
        max(0.0, p.top_n_sigma),
        max(0, p.top_k),
        p.typical_p,
        p.top_p,
        p.min_p,
        p.xtc_threshold if coin < p.xtc_probability else 2.0,
        mu_of(draw) if p.mirostat else math.inf,
    )


def mu_of(draw: Draw) -> float:
    """Mirostat's bound on the surprise, in bits: at first twice the target."""
    return 2 * draw.params.mirostat_tau if draw.mu is None else draw.mu


def narrow(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[r, vocab] logits -> the same with -inf for what these draws leave out; one token at least
    stays.
    """
    rows = _Rows.of(draws, logits.device)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    keep = torch.isfinite(ranked)
    rank = torch.arange(ranked.shape[1], device=logits.device)
    keep &= _within_sigma(ranked, keep, rows.sigma)
    keep &= (rank < rows.top_k) | (rows.top_k == 0)
    scaled = (ranked - ranked[:, :1]) / rows.temperature
    if any(d.params.typical_p < 1 for d in draws):
        keep &= _typical(scaled, keep, rows.typical)
    p = _probabilities(scaled, keep)
    mass = p.cumsum(-1)
    before = torch.cat((torch.zeros_like(mass[:, :1]), mass[:, :-1]), dim=-1)
    keep &= (before < rows.top_p * mass[:, -1:]) | (rows.top_p >= 1)
    keep &= p >= rows.min_p * p.amax(-1, keepdim=True)
    p = _probabilities(scaled, keep)
    keep &= ~_excluded(p, keep, rows.xtc)
    p = _probabilities(scaled, keep)
    best = keep & (keep.to(torch.int32).cumsum(-1) == 1)
    keep &= (-torch.log2(p) <= rows.mu) | best
    kept = torch.zeros_like(keep).scatter(1, order, keep)
    return torch.where(kept, logits, -torch.inf)


def surprise(narrowed: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[r] bits: how unlikely the drawn tokens [r] were among those that were left, as mirostat
    measures it.
    """
    heat = upload(np.array([[d.params.temperature] for d in draws], np.float32), narrowed.device)
    shifted = (narrowed - narrowed.amax(-1, keepdim=True)) / heat
    table = torch.log_softmax(shifted, dim=-1)
    drawn: Tensor = table.gather(1, tokens.long()[:, None])[:, 0]
    return drawn / -math.log(2)


def next_mu(narrowed: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[r] float32: mirostat v2's bounds after these tokens (arXiv 2007.14966, algorithm 2)."""
    facts = [(mu_of(d), d.params.mirostat_eta, d.params.mirostat_tau) for d in draws]
    mu, eta, tau = upload(np.array(facts, np.float32), narrowed.device).T
    after: Tensor = mu - eta * (surprise(narrowed, tokens, draws) - tau)
    return after


def _probabilities(scaled: Tensor, keep: Tensor) -> Tensor:
    return torch.softmax(torch.where(keep, scaled, -torch.inf), dim=-1)


def _within_sigma(ranked: Tensor, keep: Tensor, sigma: Tensor) -> Tensor:
    """Logits that are at most sigma standard deviations below the largest (Tang et al., arXiv
    2411.07641); the deviation is of the tokens that may be drawn.
    """
    values = torch.where(keep, ranked, 0.0)
    count = keep.to(torch.float32).cumsum(-1)[:, -1:]
    mean = values.cumsum(-1)[:, -1:] / count
    spread = torch.where(keep, (values - mean) ** 2, 0.0).cumsum(-1)[:, -1:] / count
    return (ranked >= ranked[:, :1] - sigma * spread.sqrt()) | (sigma <= 0)


def _typical(scaled: Tensor, keep: Tensor, mass: Tensor) -> Tensor:
    """Tokens whose surprise is nearest to the entropy, until they hold this mass (Meister et al.,
    arXiv 2202.00666; of equals all stay, as in transformers' TypicalLogitsWarper).
    """
    logp = torch.log_softmax(torch.where(keep, scaled, -torch.inf), dim=-1)
    p = logp.exp()
    entropy = -torch.where(keep, p * logp, 0.0).cumsum(-1)[:, -1:]
    distance = torch.where(keep, (-logp - entropy).abs(), torch.inf)
    nearest, order = torch.sort(distance, dim=-1, stable=True)
    held = p.gather(1, order).cumsum(-1)
    last = (held < mass).sum(-1, keepdim=True).clamp(max=held.shape[1] - 1)
    return (distance <= nearest.gather(1, last)) | (mass >= 1)


def _excluded(p: Tensor, keep: Tensor, threshold: Tensor) -> Tensor:
    """XTC ("exclude top choices", p-e-w, text-generation-webui PR 6335): of the tokens of at least
    this probability all but the last.
    """
    above = keep & (p >= threshold)
    seen = above.to(torch.int32).cumsum(-1)
    return above & (seen < seen[:, -1:])
