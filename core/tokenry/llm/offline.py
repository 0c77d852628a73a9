"""`LLM`: one object with the model, the engine and the methods that users call.

In: prompts, conversations or texts. Out: their outputs, in their order. What may be given instead
of a list, and under which names, is inputs.py's; vectors and scores are vectors.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from tokenry.backend.discovery import check_installed
from tokenry.beam_search import BeamSearchOutput, BeamSearchParams, sequences_of
from tokenry.config import EngineConfig, load
from tokenry.errors import EngineDead, RequestError
from tokenry.hub import find_model
from tokenry.llm.bar import Bar
from tokenry.llm.inputs import Prompt, as_list, as_prompts, one_each, own_names
from tokenry.messages import Ready, Stats, TokensEvent
from tokenry.outputs import RequestOutput
from tokenry.params import SamplingParams, default_params
from tokenry.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    PooledRequest,
    PoolingOutput,
    PoolingParams,
    ScoringOutput,
)
from tokenry.startup import StartLog, collector_paused, describe
from tokenry.text.outputs import OutputProcessor, Update
from tokenry.text.pooling import PooledInput
from tokenry.text.tokenizer import Tokenizer
from tokenry.vectors import Text, Vectors

if TYPE_CHECKING:
    from tokenry.assemble import Assembled

Conversation = Sequence[Mapping[str, Any]]
MakeProcessor = Callable[[Mapping[str, Any]], Callable[..., Any]]
"""extra_args -> (known token ids [n] int32, logits [vocab]) -> logits [vocab]."""


class LLM:
    """A model with an engine around it; a context manager, or `close` it.

    model           directory, hub id, or a name that an installed package provides ("demo").
    chat_template   file with a Jinja chat template, instead of the tokenizer's.
    logits_processors   by name, what SamplingParams(logits_processor=name) uses, besides those of
                    installed packages.
    progress        tell on stderr how far the start is and what the engine became.
    config          the fields of EngineConfig (or vLLM's names for them); a wrong one is a
                    ConfigError.
    """

    def __init__(
        self,
        model: str,
        *,
        chat_template: str | Path | None = None,
        logits_processors: Mapping[str, MakeProcessor] | None = None,
        progress: bool = True,
        **config: Any,
    ) -> None:
        self.config = load(EngineConfig, {"model": str(model), **own_names(config)})
        check_installed(self.config.backend)
        log = StartLog(shown=progress)
        directory = find_model(self.config.model, self.config.revision)
        source = directory if self.config.tokenizer is None else find_model(self.config.tokenizer)
        with collector_paused():
            from tokenry.assemble import assemble

            self._tokenizer = Tokenizer.load(
                source, model_path=directory, chat_template_file=chat_template
            )
            resolved = dataclasses.replace(self.config, model=str(directory))
            self._assembled: Assembled | None = assemble(
                resolved, log, logits_processors=logits_processors
            )
        self.ready: Ready = self._assembled.ready
        log.say(*describe(self.ready))
        self._processor = OutputProcessor(
            self._tokenizer,
            max_model_len=self.ready.max_model_len,
            vocab_size=self.ready.vocab_size,
            limits=self.ready.limits,
        )
        self._next_id = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One finished output per prompt, in their order. One SamplingParams for all, or one per
        prompt.

        Raises RequestError if a prompt cannot be served (then none was started), StepFailed if one
        failed.
        """
        many = as_prompts(prompts)
        encoded = [self._encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(many)]
        return self._run(encoded, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or many: the chat template makes the prompts."""
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise RequestError(
                f"messages must be a list, got a {type(messages).__name__}.", param="messages"
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        encoded = []
        for conversation in conversations:
            text = self._tokenizer.chat_template.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            encoded.append((text, self._tokenizer.encode(text, add_special_tokens=False)))
        return self._run(encoded, sampling_params, use_tqdm=use_tqdm, priority=None)

    def embed(
        self, prompts: Text | Sequence[Text], *, pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None, use_tqdm: bool = True,
    ) -> list[PooledRequest[EmbeddingOutput]]:  # fmt: skip
        """One embedding per text. truncate_prompt_tokens: -1 cuts texts to the model's length,
        without it a longer one is a RequestError, as any input of a model without embeddings.
        """
        return self._vectors(truncate_prompt_tokens, use_tqdm).embed(prompts, pooling_params)

    def classify(
        self, prompts: Text | Sequence[Text], *, pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None, use_tqdm: bool = True,
    ) -> list[PooledRequest[ClassificationOutput]]:  # fmt: skip
        """Probabilities of each text's classes; see `embed`."""
        return self._vectors(truncate_prompt_tokens, use_tqdm).classify(prompts, pooling_params)

    def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *,
        pooling_params: PoolingParams | None = None, truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PooledRequest[ScoringOutput]]:  # fmt: skip
        """How well texts belong together, one with each of many or pair by pair; see `embed`."""
        return self._vectors(truncate_prompt_tokens, use_tqdm).score(data_1, data_2, pooling_params)

    def encode(
        self, prompts: Text | Sequence[Text], *, pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None, use_tqdm: bool = True,
    ) -> list[PooledRequest[PoolingOutput]]:  # fmt: skip
        """What the model computes of each text, be it an embedding or classes; see `embed`."""
        return self._vectors(truncate_prompt_tokens, use_tqdm).encode(prompts, pooling_params)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """Per prompt the `beam_width` best answers that a beam search finds, the best first."""
        outputs = self.generate(prompts, params.sampling(), use_tqdm=use_tqdm)
        return [sequences_of(output, self._tokenizer.decode) for output in outputs]

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without sampling_params: with the model's own defaults."""
        return default_params(self.ready.sampling_defaults)

    def get_metrics(self) -> Stats:
        """The engine's counters and gauges now."""
        stats: Stats = self._engine.stats()
        return stats

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prompt beginning. True, as vLLM says it: running requests keep their
        blocks and never hinder it.
        """
        done: bool = self._engine.reset_prefix_cache()
        return done

    def close(self) -> None:
        """End the engine and free the device's memory; a second call does nothing."""
        assembled, self._assembled = self._assembled, None
        if assembled is not None:
            assembled.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _engine(self) -> Any:
        if self._assembled is None:
            raise EngineDead("This LLM was closed.", mend="make a new one")
        return self._assembled.engine

    def _encode(self, prompt: Prompt, where: str) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise RequestError(
                    f"{where} has the keys {sorted(prompt)}; known: prompt, prompt_token_ids.",
                    param=where,
                )
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._tokenizer.encode(prompt)
        return None, as_list(prompt, where)

    def _vectors(self, truncate: int | None, use_tqdm: bool) -> Vectors:
        def run(inputs: Sequence[PooledInput], params: PoolingParams) -> list[RequestOutput]:
            each = [msgspec.structs.replace(params, second_text=one.second_text) for one in inputs]
            prompts = [(one.text, list(one.token_ids)) for one in inputs]
            nothing = SamplingParams(max_tokens=0)
            return self._run(prompts, nothing, use_tqdm=use_tqdm, priority=None, pooling=each)

        return Vectors(self._tokenizer, self.ready, run, truncate=truncate)

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        use_tqdm: bool,
        priority: Sequence[int] | None,
        pooling: Sequence[PoolingParams] | None = None,
    ) -> list[RequestOutput]:
        given = self.get_default_sampling_params() if sampling_params is None else sampling_params
        all_params = one_each(given, len(prompts))
        ranks = list(priority) if priority is not None else [0] * len(prompts)
        if len(ranks) != len(prompts):
            raise RequestError(
                f"{len(ranks)} priorities for {len(prompts)} prompts.", param="priority"
            )
        engine = self._engine
        ids = [str(self._next_id + i) for i in range(len(prompts))]
        self._next_id += len(prompts)
        try:
            commands = []
            for i, (text, token_ids) in enumerate(prompts):
                commands += self._processor.add(
                    ids[i],
                    token_ids,
                    all_params[i],
                    prompt=text,
                    kind="final",
                    priority=ranks[i],
                    param=f"prompts[{i}]",
                    pooling=None if pooling is None else pooling[i],
                )
            for command in commands:
                engine.add(command)
            return self._finish(ids, use_tqdm=use_tqdm)
        except BaseException:  # KeyboardInterrupt, too: nothing of this call may run on in the next
            engine.abort(tuple(child for i in ids for child in self._processor.abort(i)))
            raise

    def _finish(self, ids: Sequence[str], *, use_tqdm: bool) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with Bar(len(ids), shown=use_tqdm) as bar:
            while len(done) < len(ids):
                if not self._engine.has_work():
                    raise EngineDead(
                        f"The engine has nothing to do, but {len(ids) - len(done)} "
                        "requests are not answered.",
                        mend="report this with the configuration",
                    )
                for update in self._updates(self._engine.step()):
                    if update.abort:
                        self._engine.abort(update.abort)
                    if update.error is not None:
                        raise update.error
                    if update.output is not None:
                        done[update.request_id] = update.output
                        bar.finished(update.output)
        return [done[request_id] for request_id in ids]

    def _updates(self, events: Iterable[object]) -> Iterable[Update]:
        for event in events:
            update = self._processor.update(event) if isinstance(event, TokensEvent) else None
            if update is not None:
                yield update
