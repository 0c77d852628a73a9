"""Rules that add to single logits or forbid single tokens, row by row.

In: logits [R, vocab], the rows that draw. Out: the same tensor, changed in place. Each rule gathers
the cells of all rows that have it and touches them at once, so a row without rules costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.params import SamplingParams
from tokenry.runner.sampling.choice import narrows
from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.marking import add_green
from tokenry.runner.sampling.repeats import dry_penalties, repeated_ngrams
from tokenry.runner.sampling.shapes import to_power_of_two
from tokenry.runner.sampling.upload import upload

Ruled = Sequence[tuple[int, Draw]]
"""(row of the logits, its draw), of the rows that have rules."""


def has_rules(draw: Draw) -> bool:
    """Whether the row's logits are changed before it draws, in whatever way: the sampler looks at
    no other row.
    """
    begins = draw.position - draw.num_prompt < draw.params.min_tokens
    return begins or draw.mask is not None or not draw.plain


def is_plain(p: SamplingParams) -> bool:
    """Whether parameters change no logit, besides what min_tokens forbids at the beginning."""
    return not (
        p.logit_bias
        or p.allowed_token_ids is not None
        or p.bad_words_ids
        or p.logits_processor is not None
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1
        or p.dry_multiplier
        or p.no_repeat_ngram_size
        or p.watermark is not None
        or narrows(p)
    )


def apply_rules(out: Tensor, ruled: Ruled, eos: tuple[int, ...]) -> None:
    """Penalties, DRY, biases, green tokens, then what is forbidden; in place."""
    _penalise(out, ruled)
    _add(out, [(i, t, -x) for i, d in ruled for t, x in dry_penalties(d).items()])
    _add(out, [(i, t, b) for i, d in ruled for t, b in (d.params.logit_bias or {}).items()])
    add_green(out, ruled)
    _forbid(out, [(i, t) for i, d in ruled for t in forbidden(d, eos)])
    for i, draw in ruled:
        allowed = draw.params.allowed_token_ids
        if allowed is not None:
            index = upload(list(allowed), out.device)
            kept = out[i][index]
            out[i] = -torch.inf
            out[i, index] = kept


def forbidden(draw: Draw, eos: tuple[int, ...]) -> list[int]:
    """Tokens that must not be drawn now: ends before min_tokens, what would complete a bad word or
    repeat an n-gram.
    """
    p = draw.params
    tokens: list[int] = []
    if draw.position - draw.num_prompt < p.min_tokens:
        tokens += [*p.stop_token_ids, *(() if p.ignore_eos else eos)]
    if p.no_repeat_ngram_size:
        tokens += repeated_ngrams(draw.history, p.no_repeat_ngram_size).tolist()
    output = draw.history[draw.num_prompt :]
    for word in p.bad_words_ids:
        begin = len(word) - 1
        if begin == 0 or (len(output) >= begin and tuple(output[-begin:].tolist()) == word[:-1]):
            tokens.append(word[-1])
    return tokens


def _penalise(out: Tensor, ruled: Ruled) -> None:
    """Repetition (prompt and output), frequency and presence (output) penalties, on the tokens that
    occur.
    """
    cells: list[tuple[int, NDArray[Any], NDArray[Any], SamplingParams]] = []
    for i, draw in ruled:
        p = draw.params
        if p.repetition_penalty == 1 and p.frequency_penalty == 0 and p.presence_penalty == 0:
            continue
        tokens, counts = np.unique(draw.history[draw.num_prompt :], return_counts=True)
        seen = np.unique(draw.history)
        in_output = np.zeros(len(seen), np.int64)
        in_output[np.searchsorted(seen, tokens)] = counts
        cells.append((i, seen, in_output, p))
    if not cells:
        return
    size = sum(len(t) for _, t, _, _ in cells)
    missing = (1 << (size - 1).bit_length()) - size

    def column(parts: list[NDArray[Any]], dtype: type) -> Tensor:
        whole: NDArray[Any] = np.concatenate(parts).astype(dtype)
        return _tensor(np.pad(whole, (0, missing), mode="edge"), out)

    rows = column([np.full(len(t), i) for i, t, _, _ in cells], np.int64)
    tokens_at = column([t for _, t, _, _ in cells], np.int64)
    count = column([c for _, _, c, _ in cells], np.float32)

    def spread(name: str) -> Tensor:
        values = [np.full(len(t), getattr(p, name)) for _, t, _, p in cells]
        return column(values, np.float32)

    value = out[rows, tokens_at]
    factor = spread("repetition_penalty")
    value = torch.where(value > 0, value / factor, value * factor)
    value = value - spread("frequency_penalty") * count
    value = value - spread("presence_penalty") * (count > 0)
    out[rows, tokens_at] = value


def _add(out: Tensor, cells: Sequence[tuple[int, int, float]]) -> None:
    if cells:
        nothing = (*cells[-1][:2], 0.0)
        rows, tokens, values = zip(*to_power_of_two(cells, nothing), strict=True)
        index = (_tensor(np.array(rows), out), _tensor(np.array(tokens), out))
        out.index_put_(index, _tensor(np.array(values, np.float32), out), accumulate=True)


def _forbid(out: Tensor, cells: Sequence[tuple[int, int]]) -> None:
    if cells:
        rows, tokens = zip(*to_power_of_two(cells), strict=True)
        out[_tensor(np.array(rows), out), _tensor(np.array(tokens), out)] = -torch.inf


def _tensor(array: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
