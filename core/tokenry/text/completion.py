"""One completion of a request: its tokens and their text, and whether it has ended.

In: the engine's events of one child. Out: the text that each added, and what a caller gets to see.
Knows no other completion of the request, and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenry.messages import TokensEvent
from tokenry.outputs import CompletionOutput, Logprob
from tokenry.params import SamplingParams
from tokenry.plan import TokenLogprobs
from tokenry.text.detokenizer import make_detokenizer
from tokenry.text.stops import StopStrings
from tokenry.text.tokenizer import Tokenizer

READ_AT_ONCE = 64
"""Tokens whose text nobody waits for are read so many at a time: few calls, none of them long."""


class Completion:
    """One completion: its tokens, its text, and whether it has ended.

    followed   its text is told as it comes. Where it is not, and no stop string is looked for, it
               is read many tokens at a time.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        followed: bool,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = make_detokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=prompt_ids
        )
        self._stops = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output)
        self._shows_stop = params.include_stop_str_in_output
        self._read_at = 1 if followed or params.stop else READ_AT_ONCE
        self._num_read = 0
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative: float | None = None if params.logprobs is None else 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    def take(self, event: TokensEvent) -> str:
        """Take the event in; the text that it added, or that is read only now."""
        num_before, tokens = len(self._token_ids), self._token_ids
        tokens += event.token_ids
        ended = event.finish_reason is not None
        text = ""
        if ended or len(tokens) - self._num_read >= self._read_at:
            ends = event.finish_reason == "stop" and not event.complete and bool(event.token_ids)
            text = self._read(len(tokens) - (ends and not self._shows_stop))
        if self._logprobs is not None:
            for entry in event.logprobs[: len(tokens) - num_before]:
                self._logprobs.append(logprobs_dict(entry, self._tokenizer))
                self._cumulative = (self._cumulative or 0.0) + entry.logprobs[0]
        if self._stops.matched is None and ended:
            text += self._end()
            if self._stops.matched is None:
                self.finish_reason, self._stop_reason = event.finish_reason, event.stop_reason
        if self._stops.matched is not None:
            self.finish_reason, self._stop_reason = "stop", self._stops.matched
        self._text += text
        return text

    def whole(self) -> CompletionOutput:
        """Everything so far."""
        return self.since(0, self._text)

    def _read(self, end: int) -> str:
        """The text of the tokens up to `end` that were not read yet; those after a stop string are
        dropped.
        """
        tokens, begin, self._num_read = self._token_ids, self._num_read, len(self._token_ids)
        if not self._params.detokenize:
            return ""
        if not self._stops:
            return self._detokenizer.feed(tokens[begin:end])
        pieces = []
        for position in range(begin, end):
            piece = self._detokenizer.feed((tokens[position],))
            if position >= self._params.min_tokens:  # before, no stop string may end or begin
                piece = self._stops.feed(piece)
            pieces.append(piece)
            if self._stops.matched is not None:
                del tokens[position + 1 :]
                break
        return "".join(pieces)

    def _end(self) -> str:
        if not self._params.detokenize:
            return ""
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()

    def since(self, start: int, text: str) -> CompletionOutput:
        """The tokens from `start` on, with this text."""
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tuple(self._token_ids[start:]),
            cumulative_logprob=self._cumulative,
            logprobs=None if self._logprobs is None else tuple(self._logprobs[start:]),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )


def logprobs_dict(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Log-probabilities at one position by token id, the chosen token first."""
    ranks = (entry.rank, *range(1, len(entry.token_ids)))
    result: dict[int, Logprob] = {}
    for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
        if token_id not in result:  # the chosen token comes again among the most likely
            text = tokenizer.token_text(token_id)
            result[token_id] = Logprob(logprob=logprob, rank=rank, decoded_token=text)
    return result
