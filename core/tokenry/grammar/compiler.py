"""Compiles grammars on threads of its own, each once, and gives every request its own matcher.

In: StructuredOutputs, the tokenizer's tokenizer.json. Out: futures of `Matcher`s; RequestError for
what is no schema, regex or grammar, or costs too much. The engine's steps go on meanwhile: the
library lets Python run while it compiles; a grammar is tried in another process first, which can be
ended (trial.py). The tokenizer is read when the first such request comes. Knows no request and no
scheduler.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import msgspec
from llguidance import LLMatcher, LLTokenizer

from tokenry.errors import RequestError
from tokenry.grammar.limits import parser_limits
from tokenry.grammar.matcher import Matcher
from tokenry.grammar.source import grammar_of, wrong
from tokenry.grammar.trial import Trial
from tokenry.structured import StructuredOutputs

MAX_CACHED = 128
"""Grammars kept compiled (or known to be wrong), those used last."""
NUM_COMPILE_THREADS = 2
"""A grammar that takes all its time does not keep the others waiting."""
NUM_MASK_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the compiler must know of the tokenizer.

    tokenizer_json   its file, as text.   vocab_size   of the model, if that has more ids.
    special_ids      ids of the tokens that are not made of characters, by their text.
    """

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    special_ids: dict[str, int]


class GrammarCompiler:
    """Owned by the engine. `start` from one thread; `close` at the end."""

    def __init__(
        self,
        read_vocabulary: Callable[[], Vocabulary],
        make_trial: Callable[[], Trial] = Trial,
    ) -> None:
        self._read_vocabulary = read_vocabulary
        self._make_trial = make_trial
        self._compilers = ThreadPoolExecutor(NUM_COMPILE_THREADS, "tokenry-grammar")
        self._mask_makers = ThreadPoolExecutor(NUM_MASK_THREADS, "tokenry-mask")
        self._opening = threading.Lock()
        self._tokenizer: tuple[LLTokenizer, Vocabulary] | None = None
        self._own = threading.local()
        self._trials: list[Trial] = []
        self._cache: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()

    def start(self, wanted: StructuredOutputs) -> Compiling:
        """Begin to compile, or find it compiled."""
        key = _key_of(wanted)
        future = self._cache.pop(key, None)
        if future is None:
            future = self._compilers.submit(self._compile, wanted)
        self._cache[key] = future
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return Compiling(future, wanted, self._mask_makers, lambda: self._cache.pop(key, None))

    def close(self) -> None:
        """End the threads and the processes that try; what is being compiled is given up."""
        for pool in (self._compilers, self._mask_makers):
            pool.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher:
        tokenizer, vocabulary = self._open_tokenizer()
        grammar = grammar_of(wanted, vocabulary.special_ids)
        why = self._trial()(grammar)
        if why is not None:
            raise wrong(wanted, why)
        state = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        if not state.is_error():
            state.compute_bitmask()  # the first mask makes the lexer, of which copies share much
        if state.is_error():
            raise wrong(wanted, state.get_error())
        return state

    def _trial(self) -> Trial:
        """The thread's own."""
        trial: Trial | None = getattr(self._own, "trial", None)
        if trial is None:
            trial = self._own.trial = self._make_trial()
            self._trials.append(trial)
        return trial

    def _open_tokenizer(self) -> tuple[LLTokenizer, Vocabulary]:
        with self._opening:
            if self._tokenizer is None:
                vocabulary = self._read_vocabulary()
                self._tokenizer = _tokenizer_of(vocabulary), vocabulary
            return self._tokenizer


class Compiling:
    """A request's wait for its matcher."""

    def __init__(
        self,
        future: Future[LLMatcher],
        wanted: StructuredOutputs,
        mask_makers: ThreadPoolExecutor,
        forget: Callable[[], object],
    ) -> None:
        self._future = future
        self._wanted = wanted
        self._mask_makers = mask_makers
        self._forget = forget

    def wait(self, timeout_s: float) -> None:
        """Until it is done, at most so long."""
        wait((self._future,), timeout_s)

    def done(self) -> bool:
        """Whether `matcher` says something."""
        return self._future.done()

    def matcher(self) -> Matcher:
        """The request's own matcher. Raises RequestError that names its field."""
        wanted, error = self._wanted, self._future.exception()
        if isinstance(error, RequestError):  # found for another request, perhaps, of another field
            message = error.message.replace(error.param or "", wanted.param, 1)
            raise RequestError(message, param=wanted.param, code=error.code) from error
        if error is not None:  # the library's own faults; they must not end the engine
            raise wrong(wanted, f"{type(error).__name__}: {error}") from error
        state = self._future.result().deep_copy()
        return Matcher(state, self._mask_makers, self._stuck)

    def _stuck(self, why: str) -> RequestError:
        """What all who share the grammar have made of it is too large: the next one begins anew."""
        self._forget()
        return wrong(self._wanted, why)


def _tokenizer_of(vocabulary: Vocabulary) -> LLTokenizer:
    eos = list(vocabulary.eos_token_ids)
    try:
        return LLTokenizer(
            vocabulary.tokenizer_json, n_vocab=vocabulary.vocab_size, eos_token=eos or None
        )
    except (ValueError, RuntimeError) as error:
        raise RequestError(
            f"structured_outputs: this model's tokenizer cannot be bound to a grammar: {error}.",
            param="structured_outputs",
            code="unsupported",
        ) from error


def _key_of(wanted: StructuredOutputs) -> bytes:
    """Hash of all that decides what is compiled."""
    plain = msgspec.structs.replace(wanted, param="")
    return hashlib.blake2b(msgspec.msgpack.encode(plain), digest_size=16).digest()
