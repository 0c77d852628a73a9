"""Beam search as vLLM's offline API has it: its parameters and its results, over our requests.

In: BeamSearchParams. Out: SamplingParams with a beam_width; from a finished RequestOutput its
sequences. The search itself is the engine's (engine/beams.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenry.errors import RequestError
from tokenry.outputs import Logprob, RequestOutput
from tokenry.params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """beam_width answers per prompt, compared by log-probability / tokens ** length_penalty.

    early_stopping   true: end with beam_width answers; false: when no beam scores better as it is;
                     "never": when none can.
    temperature      0, or 1, which is the same here; others are refused.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: Sequence[int] = ()

    def sampling(self) -> SamplingParams:
        """The same as one request's parameters. Raises RequestError."""
        if self.temperature not in (0, 1):
            text = f"temperature {self.temperature}: a beam search compares the model's own scores."
            raise RequestError(text, param="temperature")
        if self.beam_width < 1:
            raise RequestError("A beam search has 1 beam or more.", param="beam_width")
        return SamplingParams(
            n=self.beam_width,
            beam_width=self.beam_width,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            logprobs=min(MAX_LOGPROBS, 2 * self.beam_width),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchSequence:
    """One answer. tokens and text: prompt and answer, as in vLLM; logprobs: of the answer."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchOutput:
    """A prompt's answers, the best first."""

    sequences: list[BeamSearchSequence]


def sequences_of(output: RequestOutput, decode: Callable[[list[int]], str]) -> BeamSearchOutput:
    """The answers of a finished request."""
    sequences = []
    for one in output.outputs:
        tokens = [*output.prompt_token_ids, *one.token_ids]
        sequences.append(
            BeamSearchSequence(
                tokens=tokens,
                logprobs=list(one.logprobs or ()),
                cum_logprob=one.cumulative_logprob or 0.0,
                text=decode(tokens),
                finish_reason=one.finish_reason,
                stop_reason=one.stop_reason,
            )
        )
    return BeamSearchOutput(sequences=sequences)
