"""From logits to token ids: what a request's SamplingParams ask for, batched, on the device.

In: logits [R, vocab] of a launch and, per row that draws, the request's parameters and known
tokens. Out: token ids
(and log-probabilities) as device tensors; nothing here waits for the device. No row's result
depends on another row:
each draw is a function of its own logits and of one uniform number made from (seed, position)
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Op, SampleInputs
from tokenry.backend.contract import IntArray
from tokenry.errors import RequestError
from tokenry.params import SamplingParams

LogitsProcessor = Callable[[IntArray, Tensor], Tensor]
"""(known tokens [n] int32, logits [vocab]) -> logits [vocab]."""
ProcessorFactory = Callable[[Mapping[str, Any]], LogitsProcessor]
PROCESSOR_GROUP = "tokenry.logits_processors"
LOGITS_BROKEN, NOTHING_LEFT = 1, 2
"""Bits of `Sampled.broken`: the model's logits are NaN or infinite; those that are left after the
request's own rules are all -inf, or NaN.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One row that draws a token: token number `position` of the request."""

    params: SamplingParams
    seed: int
    position: int
    num_prompt: int
    history: IntArray
    processor: LogitsProcessor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Device tensors of a launch: token_ids [R] int32; broken [R] uint8, not 0 where the token
    means nothing (LOGITS_BROKEN, NOTHING_LEFT).

    errors   by row, what its logits processor raised: the row's token means nothing.
    """

    token_ids: Tensor
    broken: Tensor
    errors: Mapping[int, str]


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
    """[n] float32 in [0, 1), a function of (seed, position): two rounds of SplitMix64 (Steele et
    al., OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        state = np.array([s & (2**64 - 1) for s in seeds], np.uint64)
        mixed = _mix(_mix(state) + np.array(positions, np.uint64))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def installed_processors() -> dict[str, ProcessorFactory]:
    """Factories of installed distributions (entry-point group `tokenry.logits_processors`), by
    name. Each is imported when a request asks for it: a broken one is that request's error.
    """
    return {entry.name: _when_used(entry) for entry in entry_points(group=PROCESSOR_GROUP)}


def _when_used(entry: EntryPoint) -> ProcessorFactory:
    def make(args: Mapping[str, Any]) -> LogitsProcessor:
        factory: ProcessorFactory = entry.load()
        return factory(args)

    return make


class Sampler:
    """Owned by ModelRunner. Keeps no state of requests: their logits processors come with them."""

    def __init__(
        self,
        op: Op,
        *,
        device: str,
        eos_token_ids: Sequence[int],
        processors: Mapping[str, ProcessorFactory],
    ) -> None:
        self._op = op
        self._device = device
        self._eos = tuple(eos_token_ids)
        self._factories = processors

    def __call__(self, logits: Tensor, draws: Sequence[Draw | None]) -> Sampled:
        """Draw for the rows that have a Draw (the others' results mean nothing)."""
        # the maximum is NaN if any logit is
        broken = (~torch.isfinite(logits.amax(-1))).to(torch.uint8) * LOGITS_BROKEN
        adjusted = self._adjust(logits, draws)
        errors = self._process(adjusted, draws)
        if adjusted is not logits:
            broken |= (~torch.isfinite(adjusted.amax(-1))).to(torch.uint8) * NOTHING_LEFT
        token_ids = self._op(adjusted, self._inputs(draws))
        return Sampled(token_ids=token_ids, broken=broken, errors=errors)

    def _inputs(self, draws: Sequence[Draw | None]) -> SampleInputs:
        live = [d for d in draws if d is not None]
        all_greedy = all(d.params.greedy for d in live)
        any_filter = any(
            d.params.top_k > 0 or d.params.top_p < 1 or d.params.min_p > 0 for d in live
        )
        n = len(draws)
        floats = np.zeros((4, n), np.float32)
        floats[1] = 1.0
        top_k = np.zeros(n, np.int32)
        if not all_greedy:
            rows = [i for i, d in enumerate(draws) if d is not None]
            floats[0, rows] = [0.0 if d.params.greedy else d.params.temperature for d in live]
            floats[1, rows] = [d.params.top_p for d in live]
            floats[2, rows] = [d.params.min_p for d in live]
            floats[3, rows] = uniforms([d.seed for d in live], [d.position for d in live])
            top_k[rows] = [max(0, d.params.top_k) for d in live]
        packed = torch.from_numpy(floats).to(self._device, non_blocking=True)
        return SampleInputs(
            temperature=packed[0],
            top_p=packed[1],
            min_p=packed[2],
            uniform=packed[3],
            top_k=torch.from_numpy(top_k).to(self._device, non_blocking=True),
            all_greedy=all_greedy,
            any_filter=any_filter,
        )

    # ---- what changes logits -----------------------------------------------------------------

    def _adjust(self, logits: Tensor, draws: Sequence[Draw | None]) -> Tensor:
        """Logits with every row's own rules applied; the tensor itself where no row has any."""
        ruled = [(i, d) for i, d in enumerate(draws) if d is not None and _has_rules(d, self._eos)]
        if not ruled:
            return logits
        out = logits.clone()
        self._penalise(out, ruled)
        self._bias(out, ruled)
        self._forbid(out, ruled)
        for i, draw in ruled:
            allowed = draw.params.allowed_token_ids
            if allowed is not None:
                index = torch.tensor(allowed, device=self._device)
                kept = out[i][index]
                out[i] = -torch.inf
                out[i, index] = kept
        return out

    def _process(self, out: Tensor, draws: Sequence[Draw | None]) -> dict[int, str]:
        """Logits processors on their rows, in place (`_adjust` gave these rows a copy); what one
        raises is its row's error.
        """
        errors: dict[int, str] = {}
        for i, draw in enumerate(draws):
            if draw is None or draw.params.logits_processor is None:
                continue
            process = draw.processor or self.make_processor(draw.params)
            try:
                out[i] = process(draw.history, out[i])
            except Exception as error:  # foreign code: whatever it raises, the batch goes on
                errors[i] = _raised(draw.params, error)
        return errors

    def make_processor(self, params: SamplingParams) -> LogitsProcessor:
        """The request's own processor, so that it may keep a state. Raises RequestError."""
        name = params.logits_processor or ""
        factory = self._factories.get(name)
        if factory is None:
            known = ", ".join(sorted(self._factories)) or "none"
            raise RequestError(
                f"There is no logits processor {name!r}; installed: {known}.",
                param="logits_processor",
            )
        try:
            return factory(params.extra_args or {})
        except Exception as error:  # foreign code, as above
            raise RequestError(_raised(params, error), param="logits_processor") from error

    def _penalise(self, out: Tensor, ruled: Sequence[tuple[int, Draw]]) -> None:
        """Repetition (prompt and output), frequency and presence (output) penalties, on the tokens
        that occur.
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
        rows = self._tensor(np.concatenate([np.full(len(t), i) for i, t, _, _ in cells]))
        tokens_at = self._tensor(np.concatenate([t for _, t, _, _ in cells]).astype(np.int64))
        count = self._tensor(np.concatenate([c for _, _, c, _ in cells]).astype(np.float32))

        def spread(name: str) -> Tensor:
            values = [np.full(len(t), getattr(p, name), np.float32) for _, t, _, p in cells]
            return self._tensor(np.concatenate(values))

        value = out[rows, tokens_at]
        factor = spread("repetition_penalty")
        value = torch.where(value > 0, value / factor, value * factor)
        value = value - spread("frequency_penalty") * count
        value = value - spread("presence_penalty") * (count > 0)
        out[rows, tokens_at] = value

    def _bias(self, out: Tensor, ruled: Sequence[tuple[int, Draw]]) -> None:
        cells = [(i, t, b) for i, d in ruled for t, b in (d.params.logit_bias or {}).items()]
        if cells:
            rows, tokens, values = zip(*cells, strict=True)
            index = (self._tensor(np.array(rows)), self._tensor(np.array(tokens)))
            out.index_put_(index, self._tensor(np.array(values, np.float32)), accumulate=True)

    def _forbid(self, out: Tensor, ruled: Sequence[tuple[int, Draw]]) -> None:
        cells = [(i, t) for i, d in ruled for t in forbidden(d, self._eos)]
        if cells:
            rows, tokens = zip(*cells, strict=True)
            out[self._tensor(np.array(rows)), self._tensor(np.array(tokens))] = -torch.inf

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _raised(params: SamplingParams, error: Exception) -> str:
    return f"Logits processor {params.logits_processor!r}: {type(error).__name__}: {error}"


def _has_rules(draw: Draw, eos: tuple[int, ...]) -> bool:
    p = draw.params
    return bool(
        p.logit_bias
        or p.allowed_token_ids is not None
        or p.bad_words_ids
        or p.logits_processor
        or p.presence_penalty
        or p.frequency_penalty
        or p.repetition_penalty != 1
        or draw.position - draw.num_prompt < p.min_tokens
    )


def forbidden(draw: Draw, eos: tuple[int, ...]) -> list[int]:
    """Tokens that must not be drawn now: ends before min_tokens, and what would complete a bad
    word.
    """
    p = draw.params
    tokens: list[int] = []
    if draw.position - draw.num_prompt < p.min_tokens:
        tokens += [*p.stop_token_ids, *(() if p.ignore_eos else eos)]
    output = draw.history[draw.num_prompt :]
    for word in p.bad_words_ids:
        begin = len(word) - 1
        if begin == 0 or (len(output) >= begin and tuple(output[-begin:].tolist()) == word[:-1]):
            tokens.append(word[-1])
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities on the device: of the given token [n], its rank [n], and the top k [n,
    k].
    """

    chosen: Tensor
    rank: Tensor
    top_logprobs: Tensor
    top_tokens: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """In the order in which they are fetched."""
        return [self.chosen, self.rank, self.top_logprobs, self.top_tokens]


def score(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    """log_softmax of raw logits [n, vocab] at tokens [n], its rank, and the k most likely."""
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, tokens.long()[:, None])
    top = table.topk(min(k, table.shape[1]), dim=-1)
    return Scores(
        chosen=chosen[:, 0],
        rank=(table > chosen).sum(-1) + 1,
        top_logprobs=top.values,
        top_tokens=top.indices,
    )
