"""From a config to a running engine: the only file that knows every room.

In: EngineConfig. Out: `Assembled`, an engine with its runner behind it, and what a front must know
(`Ready`). What the
device wants otherwise than configured is applied here, once, and told in `Ready.notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tokenry.backend.contract import Caps
from tokenry.backend.discovery import choose, discover
from tokenry.backend.invariance import open_device
from tokenry.config import Change, EngineConfig, apply_changes
from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.errors import ConfigError
from tokenry.grammar.compiler import GrammarCompiler, Vocabulary
from tokenry.hub import find_model
from tokenry.messages import Ready, RequestLimits, Stats
from tokenry.models.config import ENCODERS, read_config
from tokenry.models.generation import sampling_defaults, told
from tokenry.models.head import Head, PoolingPlan
from tokenry.models.pooling import generates, plan_pooling, served_len
from tokenry.models.registry import load_spec, pick_dtype
from tokenry.params import NEEDS_LOGITS
from tokenry.pooling import PoolingFacts
from tokenry.runner.bucket_file import bucket_settings
from tokenry.runner.encoder import EncoderRunner
from tokenry.runner.memory import MemoryLimits, check_weights_fit
from tokenry.runner.pooling import Pooler
from tokenry.runner.runner import ModelRunner, RunnerConfig
from tokenry.runner.sampling.processors import ProcessorFactory, installed_processors
from tokenry.structured import is_one_token
from tokenry.text.tokenizer import Tokenizer

Progress = Callable[[str, float], None]


class Engine(EngineCore):
    """EngineCore whose stats also tell what the runner counts."""

    def __init__(
        self,
        limits: EngineLimits,
        runner: ModelRunner | EncoderRunner,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        super().__init__(limits, runner, grammars)
        self._model_runner = runner

    def stats(self) -> Stats:
        """Of the scheduler and of the runner."""
        programs, uncompiled, fallbacks = self._model_runner.stats()
        return msgspec.structs.replace(
            super().stats(),
            programs=programs,
            uncompiled_launches=uncompiled,
            op_fallbacks=fallbacks,
        )


NARROWER = {"int8": 2, "int4": 3}
"""How many times smaller quantised weights are than 16-bit ones, embeddings and scales included: at
least this, for the check before anything is loaded.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A running engine. `runner` is for tests and benchmarks that look inside."""

    engine: Engine
    ready: Ready
    runner: Any
    config: EngineConfig


def assemble(
    config: EngineConfig,
    progress: Progress = lambda phase, share: None,
    *,
    logits_processors: Mapping[str, ProcessorFactory] | None = None,
    compile_only: bool = False,
) -> Assembled:
    """Find the model and the device, load, plan memory, warm up. Raises TokenryError with the
    mend.

    compile_only: for the programs that a backend keeps between starts; the device may be absent,
    and nothing can be served then.
    """
    path = find_model(config.model, config.revision)
    checkpoint = read_config(path)
    defaults = sampling_defaults(path, config.generation_config)
    progress("opening device", 0.0)
    device = choose(
        discover(config.backend),
        config.backend,
        index=config.device_index,
        compile_only=compile_only,
    )
    backend = open_device(device, config.backend_options, deterministic=config.deterministic)
    if compile_only and backend.caps.graphs != "aot":
        raise ConfigError(f"The {device.backend} backend does not compile ahead of time.")
    pooling = plan_pooling(
        path, checkpoint, task=config.task, method=config.pooling, matryoshka=config.matryoshka
    )
    tokens = generates(checkpoint.architecture, config.task, pooling)
    whole = checkpoint.architecture.startswith(ENCODERS)
    changes = _changes(config, backend.caps, whole=whole)
    config = apply_changes(config, changes)
    longest = checkpoint.max_len if pooling is None else served_len(path, checkpoint)
    config, context, fitted = _fit_step(config, longest)
    changes += fitted
    spec = load_spec(
        path,
        dtype=pick_dtype(config.dtype, checkpoint.dtype, backend.caps),
        max_model_len=context,
        dummy=config.load_format == "dummy",
        trust_remote_code=config.trust_remote_code,
        pooling=pooling,
        tokens=tokens,
    )
    _check_quantization(config, device.backend, backend.caps)
    weight_bytes = spec.weight_bytes // (
        NARROWER[config.quantization] if config.quantization else 1
    )
    check_weights_fit(weight_bytes, backend.memory(), config.memory_fraction)
    processors = {**installed_processors(), **(logits_processors or {})}
    head = None if pooling is None else Head(pooling, dummy=spec.dummy)
    runner: ModelRunner | EncoderRunner
    weights = spec.weights(lambda share: progress("loading weights", share))
    given = (backend, spec, weights, _runner_config(config))
    if whole and head is not None:
        runner = EncoderRunner(*given, head=head, progress=progress)
    else:
        pooler = Pooler(head, hidden=checkpoint.hidden_size, tokens=tokens) if head else None
        runner = ModelRunner(
            *given,
            eos_token_ids=spec.eos_token_ids,
            processors=processors,
            pooler=pooler,
            progress=progress,
        )
    pools_whole = pooling is not None and pooling.method != "last"
    engine = Engine(
        replace(
            _limits(config, backend.caps, runner),
            pools_whole=pools_whole,
            forks=backend.caps.phases.chunked,
        ),
        runner,
        GrammarCompiler(lambda: _vocabulary(config, path, spec.vocab_size)) if tokens else None,
    )
    notes = [*spec.notes, *(f"{c.field} = {c.value}: {c.why}" for c in changes)]
    notes += runner.notes
    notes += told(defaults)
    fallbacks = runner.stats()[2]
    if fallbacks:
        named = ", ".join(f"{name} x{count}" for name, count in sorted(fallbacks.items()))
        notes.append(f"ops on the reference (slow, right): {named}")
    ready = Ready(
        max_model_len=runner.plan.max_model_len,
        num_blocks=runner.plan.num_blocks,
        block_size=runner.block_size,
        vocab_size=spec.vocab_size,
        backend=device.backend,
        device_name=device.name,
        architecture=spec.architecture,
        dtype=spec.dtype,
        ledger=dict(runner.plan.ledger),
        notes=tuple(notes),
        sampling_defaults=defaults,
        limits=RequestLimits(
            max_top_k=backend.caps.sample_max_top_k,
            priorities=config.scheduling_policy != "fcfs",
            logits_processors=tuple(sorted(processors)),
            tokens=tokens,
            vectors=None if pooling is None else _facts(pooling),
            unserved=NEEDS_LOGITS if backend.caps.sampling == "tokens" else (),
        ),
    )
    return Assembled(engine=engine, ready=ready, runner=runner, config=config)


def _facts(pooling: PoolingPlan) -> PoolingFacts:
    """What a front must know of the vectors."""
    return PoolingFacts(
        kind=pooling.task,
        width=pooling.width,
        labels=pooling.labels,
        matryoshka=pooling.matryoshka,
        pairs=pooling.task == "classify",
        template=pooling.template,
    )


def _changes(config: EngineConfig, caps: Caps, *, whole: bool = False) -> list[Change]:
    """What this device, or a model that reads texts as a whole, needs otherwise than configured."""
    changes = []
    if not caps.phases.chunked or whole:
        why = "the device cannot continue a prompt that is partly cached"
        if whole:
            why = "an encoder reads a text from both sides, so all of it at once"
        for field in ("enable_chunked_prefill", "enable_prefix_caching"):
            if getattr(config, field):
                changes.append(Change(field=field, value=False, why=why))
    if caps.shapes.static and config.enforce_eager:
        why = "on this device only warmed programs run"
        changes.append(Change(field="enforce_eager", value=False, why=why))
    if config.overlap and not caps.token_feedback:
        why = "the device cannot take the next step's tokens from the last one"
        changes.append(Change(field="overlap", value=False, why=why))
    return changes


def _vocabulary(config: EngineConfig, model: Path, vocab_size: int) -> Vocabulary:
    """Of the tokenizer that the fronts have; read when a grammar first needs it."""
    source = model if config.tokenizer is None else find_model(config.tokenizer)
    tokenizer = Tokenizer.load(source, model_path=model)
    added = tokenizer.core.get_added_tokens_decoder()
    return Vocabulary(
        tokenizer_json=tokenizer.core.to_str(),
        vocab_size=max(vocab_size, tokenizer.vocab_size),
        eos_token_ids=tuple(i for i in tokenizer.eos_token_ids if i < vocab_size),
        special_ids={
            token.content: i
            for i, token in added.items()
            if is_one_token(token.content, token.special)
        },
    )


def _check_quantization(config: EngineConfig, name: str, caps: Caps) -> None:
    """Raises ConfigError where the device has no such weights."""
    if config.quantization is not None and config.quantization not in caps.quant:
        has = ", ".join(sorted(caps.quant)) or "none"
        raise ConfigError(
            f"--quantization {config.quantization}: the {name} backend has {has}.",
            mend="leave --quantization out, or another --backend",
        )


def _fit_step(
    config: EngineConfig, model_len: int
) -> tuple[EngineConfig, int | None, list[Change]]:
    """The config, the longest context (None: the model's), and what was changed. Without chunks a
    request must fit one step, also when it comes back with its answer after a preemption.

    A context that was asked for widens the step; without one the context is fitted to the step, for
    the memory of a step, and on static devices its programs, grow with it.
    """
    context, budget = config.max_model_len, config.max_num_batched_tokens
    if config.enable_chunked_prefill or (context or model_len) <= budget:
        return config, context, []
    if context is not None:
        why = "without chunked prefill a request of max_model_len must fit one step"
        changes = [Change(field="max_num_batched_tokens", value=context, why=why)]
        return apply_changes(config, changes), context, changes
    why = (
        f"without chunked prefill a request must fit one step of {budget} tokens; the model has "
        f"{model_len}: --max-model-len for more"
    )
    # not applied: a max_model_len in the config is one that must not be fitted to memory
    return config, budget, [Change(field="max_model_len", value=budget, why=why)]


def _runner_config(config: EngineConfig) -> RunnerConfig:
    return RunnerConfig(
        memory=MemoryLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            memory_fraction=config.memory_fraction,
            kv_cache_bytes=config.kv_cache_bytes,
            num_kv_blocks=config.num_kv_blocks,
        ),
        block_size=config.block_size,
        quantization=config.quantization,
        enforce_eager=config.enforce_eager,
        warmup=config.warmup,
        buckets=bucket_settings(
            strategy=config.bucket_strategy,
            axes=config.bucket_axis,
            file=config.bucket_file,
            max_programs=config.max_programs,
        ),
        record_steps=config.record_steps,
    )


def _overlaps(config: EngineConfig, caps: Caps) -> bool:
    if config.overlap is None:
        return caps.token_feedback and caps.overlap_pays
    return config.overlap


def _limits(config: EngineConfig, caps: Caps, runner: ModelRunner | EncoderRunner) -> EngineLimits:
    return EngineLimits(
        num_blocks=runner.plan.num_blocks,
        block_size=runner.block_size,
        max_model_len=runner.plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        prefix_caching=config.enable_prefix_caching,
        chunked_prefill=config.enable_chunked_prefill,
        policy=config.scheduling_policy,
        overlap=_overlaps(config, caps),
        seed=config.seed,
    )
