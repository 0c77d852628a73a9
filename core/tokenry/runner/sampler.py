"""From logits to token ids: what a request's SamplingParams ask for, batched, on the device.

In: logits [R, vocab] of a launch and, per row that draws, the request's parameters and known
tokens. Out: token ids
(and log-probabilities) as device tensors; nothing here waits for the device. No row's result
depends on another row:
each draw is a function of its own logits and of one uniform number made from (seed, position)
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from tokenry.backend.base import Op, SampleInputs
from tokenry.errors import Refusal
from tokenry.params import SamplingParams
from tokenry.runner.mask import apply_masks
from tokenry.runner.sampling.choice import narrow, narrows, next_mu
from tokenry.runner.sampling.draw import Draw, uniforms
from tokenry.runner.sampling.marking import add_gumbel, by_gumbel
from tokenry.runner.sampling.processors import (
    LogitsProcessor,
    ProcessorFactory,
    make_processor,
    raised,
)
from tokenry.runner.sampling.rules import Ruled, apply_rules, has_rules
from tokenry.runner.sampling.shapes import to_power_of_two
from tokenry.runner.sampling.upload import upload

NEUTRAL = (0.0, 1.0, 0.0, 0.0)
"""Temperature, top_p, min_p and top_k of a row that draws nothing."""
ROWS_AT_ONCE = 16
"""Most rows that are narrowed at once: so much memory it may take, and so few shapes it has."""
Checked = Callable[[Tensor, SampleInputs], tuple[Tensor, Tensor]]
"""The `sample` op, with which rows are broken (1: LOGITS_BROKEN)."""
LOGITS_BROKEN, NOTHING_LEFT = 1, 2
"""Bits of `Sampled.broken`: the model's logits are NaN or infinite; those that are left after the
request's own rules are all -inf, or NaN.
"""


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """Device tensors of a launch: token_ids [R] int32; broken [R] uint8, not 0 where the token
    means nothing (LOGITS_BROKEN, NOTHING_LEFT).

    errors   by row, what its logits processor or its grammar raised: the row's token means nothing.
    mu       [>= m] float32, mirostat's bounds after the tokens of the m rows mu_rows.
    """

    token_ids: Tensor
    broken: Tensor
    errors: Mapping[int, str | Refusal]
    mu: Tensor | None = None
    mu_rows: tuple[int, ...] = ()


class Sampler:
    """Owned by ModelRunner. Keeps no state of requests: their logits processors come with them.
    What the last step's rows asked of the op is on the device still, for rows that ask the same.
    """

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
        self._greedy: dict[int, SampleInputs] = {}
        self._settings: list[tuple[float, float, float, float]] = []
        self._columns: Sequence[Tensor] = ()
        self._checked: Checked = getattr(op, "checked", self._check)

    def __call__(self, logits: Tensor, draws: Sequence[Draw | None]) -> Sampled:
        """Draw for the rows that have a Draw (the others' results mean nothing)."""
        ruled = [(i, d) for i, d in enumerate(draws) if d is not None and has_rules(d)]
        if not ruled:  # most steps: nothing below would touch a row
            token_ids, broken = self._checked(logits, self._inputs(draws, ()))
            return Sampled(token_ids=token_ids, broken=broken, errors={})
        broken = _not_finite(logits, LOGITS_BROKEN)
        adjusted = logits.clone()
        apply_rules(adjusted, ruled, self._eos)
        errors = self._process(adjusted, ruled)
        masks = [None if d is None else d.mask for d in draws]
        errors |= apply_masks(adjusted, masks, self._device)
        broken |= _not_finite(adjusted, NOTHING_LEFT)
        self._narrow(adjusted, ruled)
        steered = [(i, d) for i, d in ruled if d.params.mirostat and not d.params.greedy]
        steered_padded = to_power_of_two(steered)
        left = adjusted[self._rows(steered_padded)] if steered else None
        marked = [(i, d) for i, d in ruled if by_gumbel(d)]
        add_gumbel(adjusted, marked)
        token_ids = self._op(adjusted, self._inputs(draws, {i for i, _ in marked}))
        mu_rows = tuple(i for i, _ in steered)
        mu = None
        if left is not None:
            drawn = token_ids[self._rows(steered_padded)]
            mu = next_mu(left, drawn, [d for _, d in steered_padded])
        return Sampled(token_ids=token_ids, broken=broken, errors=errors, mu=mu, mu_rows=mu_rows)

    def _check(self, logits: Tensor, inputs: SampleInputs) -> tuple[Tensor, Tensor]:
        broken = _not_finite(logits, LOGITS_BROKEN)  # before the op, which may work in place
        return self._op(logits, inputs), broken

    def _narrow(self, out: Tensor, ruled: Ruled) -> None:
        """Candidates of the rows whose parameters the `sample` op does not know, in place."""
        rows = [(i, d) for i, d in ruled if narrows(d.params)]
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = to_power_of_two(rows[begin : begin + ROWS_AT_ONCE])
            index = self._rows(some)
            out[index] = narrow(out[index], [d for _, d in some])

    def _rows(self, some: Ruled) -> Tensor:
        """Their indices, on the device."""
        return upload([i for i, _ in some], self._device)

    def _inputs(self, draws: Sequence[Draw | None], marked: Collection[int]) -> SampleInputs:
        """What the op needs. The rows that were narrowed are filtered already; in those that a
        watermark draws the token is the one with the largest logit.
        """
        greedy = [d is None or d.params.greedy or i in marked for i, d in enumerate(draws)]
        if all(greedy):
            return self._all_greedy(len(draws))
        rows: list[int] = []
        settings = [NEUTRAL] * len(draws)
        for i, d in enumerate(draws):
            if d is not None:
                rows.append(i)
                p, heat = d.params, 0.0 if greedy[i] else d.params.temperature
                own = d.plain or not narrows(p)
                settings[i] = (heat, p.top_p, p.min_p, max(0, p.top_k)) if own else (heat, 1, 0, 0)
        if settings != self._settings:
            self._settings, self._columns = settings, _columns(settings, self._device)
        numbers = np.zeros(len(draws), np.float32)
        live = [d for d in draws if d is not None]
        numbers[rows] = uniforms([d.seed for d in live], [d.position for d in live])
        temperature, top_p, min_p, top_k = self._columns
        return SampleInputs(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            uniform=upload(numbers, self._device),
            top_k=top_k,
            all_greedy=False,
            any_filter=any(p < 1 or m > 0 or k > 0 for _, p, m, k in settings),
        )

    def _all_greedy(self, rows: int) -> SampleInputs:
        """Made once for a number of rows: the op reads nothing but the flag."""
        if rows not in self._greedy:
            zeros = torch.zeros(rows, device=self._device)
            self._greedy[rows] = SampleInputs(
                temperature=zeros,
                top_p=torch.ones(rows, device=self._device),
                min_p=zeros,
                uniform=zeros,
                top_k=torch.zeros(rows, dtype=torch.int32, device=self._device),
                all_greedy=True,
                any_filter=False,
            )
        return self._greedy[rows]

    def _process(self, out: Tensor, ruled: Ruled) -> dict[int, str | Refusal]:
        """Logits processors on their rows, in place; what one raises is its row's error."""
        errors: dict[int, str | Refusal] = {}
        for i, draw in ruled:
            if draw.params.logits_processor is None:
                continue
            process = draw.processor or self.make_processor(draw.params)
            try:
                out[i] = process(draw.history, out[i])
            except Exception as error:  # foreign code: whatever it raises, the batch goes on
                errors[i] = raised(draw.params, error)
        return errors

    def make_processor(self, params: SamplingParams) -> LogitsProcessor:
        """The request's own processor, so that it may keep a state. Raises RequestError."""
        return make_processor(self._factories, params)


def _columns(
    settings: Sequence[tuple[float, float, float, float]], device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Temperature, top_p and min_p [n] float32, top_k [n] int32 on the device."""
    columns = np.array(settings, np.float64).T
    temperature, top_p, min_p = upload(np.ascontiguousarray(columns[:3], np.float32), device)
    return temperature, top_p, min_p, upload(columns[3].astype(np.int32), device)


def _not_finite(logits: Tensor, flag: int) -> Tensor:
    """[R] uint8: `flag` where a row's largest logit is infinite, or NaN (as it is if any is)."""
    top = logits.amax(-1)
    return (top - top != 0).to(torch.uint8) * flag
