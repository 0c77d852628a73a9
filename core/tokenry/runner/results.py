"""From a step's device tensors to its StepResult.

Collects, launch by launch, what is to be copied to the host; once the copy is there, puts it
together row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenry.errors import Refusal
from tokenry.plan import RowResult, StepPlan, StepResult, TokenLogprobs
from tokenry.runner.requests import RequestState
from tokenry.runner.sampler import LOGITS_BROKEN, Sampled
from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.scores import Scores, score
from tokenry.runner.sampling.upload import upload
from tokenry.runner.shapes import Launch, Share

NAN_LOGITS = (
    "The model's logits are NaN or infinite: its weights or this prompt overflow the dtype."
)
NOTHING_TO_DRAW = (
    "With the request's rules (allowed_token_ids, bad_words, logit_bias, min_tokens with its ends, "
    "logits_processor, structured_outputs) nothing may be drawn here."
)


Told = tuple[TokenLogprobs, ...]
Lesson = tuple[RequestState, tuple[int, ...], float | None]
"""Whose, the tokens that it now knows, and mirostat's bound after them."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result, and what the runner's request states learn from it."""

    result: StepResult
    lessons: list[Lesson]


class _Rows(msgspec.Struct, frozen=True, kw_only=True):
    """A launch's sampled rows: (row of the plan, row of the tensor)."""

    pairs: list[tuple[int, int]]
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Scores of some tensor rows: which plan rows they are of, how many alternatives each wants."""

    rows: list[int]
    wanted: list[int]
    at: int
    prompt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steered:
    """Plan rows whose mirostat bounds are at this place."""

    rows: list[int]
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRows:
    """Hidden rows of a text that become part of its vector: `count` rows of tensor `at`, from
    `first` on. row: of the plan; ends: the text's last rows.
    """

    state: RequestState
    row: int
    at: int
    first: int
    count: int
    ends: bool


class PartialStep:
    """Owned by ModelRunner, for one step. `tensors` is what is to be fetched, `pooled` what of it
    becomes vectors.
    """

    def __init__(self, plan: StepPlan, states: Sequence[RequestState]) -> None:
        self._plan = plan
        self._states = states
        self._errors: dict[str, str | Refusal] = {}
        self._sampled: list[_Rows] = []
        self._scored: list[_Scored] = []
        self._steered: list[_Steered] = []
        self.pooled: list[PooledRows] = []
        self.tensors: list[Tensor] = []

    def fail(self, request_id: str, error: str | Refusal) -> None:
        """The row cannot be computed, or must not be."""
        self._errors[request_id] = error

    def note_sampled(
        self,
        launch: Launch,
        states: Sequence[RequestState],
        draws: Sequence[Draw | None],
        logits: Tensor,
        sampled: Sampled,
    ) -> None:
        """A launch's draws, and the log-probabilities of those that want them."""
        pairs = [(share.row, i) for i, share in enumerate(launch.shares) if share.sample]
        if not pairs:
            return
        for i, error in sampled.errors.items():
            self.fail(self._plan.rows[launch.shares[i].row].request_id, error)
        self._sampled.append(_Rows(pairs=pairs, at=len(self.tensors)))
        self.tensors += [sampled.token_ids, sampled.broken]
        if sampled.mu is not None:
            rows = [launch.shares[i].row for i in sampled.mu_rows]
            self._steered.append(_Steered(rows=rows, at=len(self.tensors)))
            self.tensors.append(sampled.mu)
        wanting = [(row, i) for row, i in pairs if self._states[row].num_scores is not None]
        if wanting:
            index = upload([i for _, i in wanting], logits.device)
            wanted = [self._states[row].num_scores or 0 for row, _ in wanting]
            scores = score(logits[index], sampled.token_ids[index], max(wanted))
            rows = [row for row, _ in wanting]
            self._note_scores(scores, rows, wanted, prompt=False)

    def note_prompt(self, share: Share, state: RequestState, logits: Tensor) -> None:
        """Full logits [>= count, vocab] of one share: scores of the prompt tokens that follow
        each.
        """
        end = min(share.start + share.count + 1, state.num_prompt)
        targets = state.tokens[share.start + 1 : end]
        if len(targets) == 0:
            return
        tokens = upload(targets.copy(), logits.device)
        wanted = state.params.prompt_logprobs or 0
        scores = score(logits[: len(targets)], tokens, wanted)
        self._note_scores(
            scores, [share.row] * len(targets), [wanted] * len(targets), prompt=True, tokens=tokens
        )

    def _note_scores(
        self,
        scores: Scores,
        rows: list[int],
        wanted: list[int],
        *,
        prompt: bool,
        tokens: Tensor | None = None,
    ) -> None:
        self._scored.append(_Scored(rows=rows, wanted=wanted, at=len(self.tensors), prompt=prompt))
        self.tensors += scores.tensors
        if tokens is not None:
            self.tensors.append(tokens)

    def finish(self, arrays: Sequence[NDArray[Any]]) -> Outcome:
        """Rows in the plan's order, from the fetched arrays."""
        token_of: dict[int, int] = {}
        for rows in self._sampled:
            tokens, broken = arrays[rows.at].tolist(), arrays[rows.at + 1].tolist()
            for index, i in rows.pairs:
                if broken[i]:
                    self._fail_draw(index, broken[i])
                else:
                    token_of[index] = tokens[i]
        mu_of = self._finish_mu(arrays)
        logprobs, prompt_logprobs = self._finish_scores(arrays, token_of)
        errors, states = self._errors, self._states
        results: list[RowResult] = []
        lessons: list[Lesson] = []
        token_ids: tuple[int, ...]
        for i, row in enumerate(self._plan.rows):
            request_id = row.request_id
            if request_id in errors:
                results.append(_failed(request_id, errors[request_id]))
                continue
            token_ids, mu = (), None
            if i in token_of:
                token_ids, mu = (token_of[i],), mu_of.get(i)
                lessons.append((states[i], token_ids, mu))
            results.append(
                RowResult(
                    request_id=request_id,
                    token_ids=token_ids,
                    logprobs=logprobs.get(i, ()),
                    prompt_logprobs=prompt_logprobs.get(i, ()),
                    mu=mu,
                )
            )
        result = StepResult(step=self._plan.step, rows=tuple(results))
        return Outcome(result=result, lessons=lessons)

    def _finish_mu(self, arrays: Sequence[NDArray[Any]]) -> dict[int, float]:
        return {
            row: float(mu)
            for steered in self._steered
            for row, mu in zip(steered.rows, arrays[steered.at], strict=False)
        }

    def _fail_draw(self, index: int, broken: int) -> None:
        """The row's logits hold no token; what its logits processor raised is told rather."""
        request_id = self._plan.rows[index].request_id
        if broken & LOGITS_BROKEN:
            self.fail(request_id, NAN_LOGITS)
        elif request_id not in self._errors:
            own = self._states[index].params.logits_processor is not None
            self.fail(request_id, NOTHING_TO_DRAW if own else Refusal(message=NOTHING_TO_DRAW))

    def _finish_scores(
        self, arrays: Sequence[NDArray[Any]], token_of: dict[int, int]
    ) -> tuple[dict[int, Told], dict[int, Told]]:
        """By plan row: of the drawn tokens, of the prompt's."""
        drawn: dict[int, list[TokenLogprobs]] = {}
        prompt: dict[int, list[TokenLogprobs]] = {}
        for scored in self._scored:
            chosen, rank, top, top_tokens = (
                np.asarray(a) for a in arrays[scored.at : scored.at + 4]
            )
            targets = arrays[scored.at + 4] if scored.prompt else None
            into = prompt if scored.prompt else drawn
            for i, (row, k) in enumerate(zip(scored.rows, scored.wanted, strict=True)):
                token = int(targets[i]) if targets is not None else token_of.get(row, 0)
                into.setdefault(row, []).append(
                    TokenLogprobs(
                        token_ids=(token, *(int(t) for t in top_tokens[i, :k])),
                        logprobs=(float(chosen[i]), *(float(x) for x in top[i, :k])),
                        rank=int(rank[i]),
                    )
                )
        of_drawn, of_prompt = ({i: tuple(x) for i, x in some.items()} for some in (drawn, prompt))
        return of_drawn, of_prompt


def _failed(request_id: str, error: str | Refusal) -> RowResult:
    if isinstance(error, Refusal):
        return RowResult(request_id=request_id, error=error.message, refusal=error)
    return RowResult(request_id=request_id, error=error)
