"""Runs plans: loads the model, plans memory, warms up; then packs, launches and samples one step
after the other.

In: StepPlan. Out: a function that waits for the StepResult. Owns device tensors, KV storage,
programs and each request's host state. Knows nothing of queues, text or HTTP.

Two threads meet here: steps are run on one, their results are waited for on another (the engine's).
What a result teaches goes through a queue that the next `run` empties, so request state has one
writer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tokenry.backend.base import Backend, ModelSpec, StepBatch, WeightIter
from tokenry.backend.contract import Bucket, HostBatch, KVSpec
from tokenry.backend.ops import OpTable
from tokenry.errors import Refusal, RequestError
from tokenry.plan import NewRequest, Row, StepPlan, StepResult
from tokenry.runner.bucket_grid import deviations, make_buckets, maxima
from tokenry.runner.buckets import BucketSettings, BucketTable, exact, need_of
from tokenry.runner.memory import (
    MemoryLimits,
    MemoryPlan,
    pick_block_size,
    plan_memory,
    with_programs,
)
from tokenry.runner.pack import Packed, blank_batch, pack, table_width, to_device
from tokenry.runner.pooling import Pooler
from tokenry.runner.probe import run_deep_steps
from tokenry.runner.programs import Programs
from tokenry.runner.requests import RequestState
from tokenry.runner.results import Lesson, Outcome, PartialStep
from tokenry.runner.sampler import Sampler
from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.processors import ProcessorFactory
from tokenry.runner.shapes import Extent, Launch, Share, split
from tokenry.runner.step_errors import typed_steps
from tokenry.runner.step_log import StepLog
from tokenry.runner.trial import try_draws

Progress = Callable[[str, float], None]


class ModelShape(ModelSpec, Protocol):
    """A model whose KV the runner can size."""

    @property
    def num_layers(self) -> int:
        """Layers with KV."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Of keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """What of the engine's config the runner needs."""

    memory: MemoryLimits
    block_size: int | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    warmup: bool = True
    buckets: BucketSettings = field(default_factory=BucketSettings)
    record_steps: str | None = None


class ModelRunner:
    """A StepRunner (see plan.py) over one backend."""

    def __init__(
        self,
        backend: Backend,
        spec: ModelShape,
        weights: WeightIter,
        config: RunnerConfig,
        *,
        eos_token_ids: Sequence[int] = (),
        processors: Mapping[str, ProcessorFactory] | None = None,
        pooler: Pooler | None = None,
        progress: Progress = lambda phase, share: None,
    ) -> None:
        self._backend = backend
        self._pooler = pooler
        self._caps = backend.caps
        self._ops = OpTable(backend.ops(), config.quantization)
        self._sampler = Sampler(
            self._ops.resolve("sample", vocab_size=spec.vocab_size),
            device=self._caps.input_device,
            eos_token_ids=eos_token_ids,
            processors=processors or {},
        )
        self._requests: dict[str, RequestState] = {}
        self._lessons: deque[list[Lesson]] = deque()
        self._previous: list[Tensor] = []
        self._fed: list[RequestState] = []
        self._log = StepLog(config.record_steps) if config.record_steps is not None else None
        progress("loading weights", 0.0)
        used_before = backend.memory().used
        self._step = backend.build_model(spec, weights, self._ops)
        self.block_size = pick_block_size(config.block_size, self._caps.block_sizes)
        self._kv_spec = KVSpec(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=self.block_size,
            dtype=spec.dtype,
        )
        progress("planning memory", 0.0)
        self._table_len = spec.max_model_len  # positions that the model's tables have
        self.plan = self._plan(config, spec.max_model_len, used_before)
        self._extent = self._extent_of(config, self.plan.max_model_len, self.plan.num_blocks)
        kv = backend.alloc_kv(self._kv_spec, self.plan.num_blocks)
        self._kv = kv
        eager = config.enforce_eager and not self._caps.shapes.static
        buckets = [] if eager else make_buckets(self._caps, self._extent, config.buckets)
        self._bucket_notes = deviations(self._caps, config.buckets, buckets)
        step = self._step
        self._programs = Programs(backend, lambda batch: step(batch, kv), buckets)
        if config.warmup or self._caps.shapes.static:
            self._warm_up(progress)
            self.plan = with_programs(self.plan, backend.program_bytes())
        self._table = BucketTable(self._programs.buckets, self._caps, config.buckets.block_price)

    # ---- the start ---------------------------------------------------------------------------

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the start-up log."""
        late = (self._programs.note,) if self._programs.note is not None else ()
        return (*self.plan.notes, *self._bucket_notes, *late)

    def stats(self) -> tuple[int, int, dict[str, int]]:
        """Programs, launches that ran uncompiled, ops that fell back to the reference."""
        return len(self._programs), self._programs.uncompiled_launches, dict(self._ops.fallbacks)

    def compile_count(self) -> int:
        """The backend's own count of programs made."""
        return self._backend.compile_count()

    def _extent_of(self, config: RunnerConfig, max_model_len: int, num_blocks: int) -> Extent:
        limits = config.memory
        return Extent(
            max_seqs=limits.max_num_seqs,
            max_tokens=limits.max_num_batched_tokens,
            max_blocks=-(-max_model_len // self.block_size),
            block_size=self.block_size,
            total_blocks=num_blocks,
        )

    def _plan(self, config: RunnerConfig, model_len: int, used_before: int) -> MemoryPlan:
        probe = None if self._caps.kv_baked else lambda: self._probe(config, model_len)
        return plan_memory(
            self._backend,
            self._kv_spec,
            config.memory,
            model_len=model_len,
            probe=probe,
            used_before=used_before,
        )

    def _probe(self, config: RunnerConfig, model_len: int) -> None:
        """The worst steps that can come, on a KV of one block: all tokens, all sequences, the
        sampler, the end of the longest context, all logits; on static devices the largest program
        of every kind.
        """
        most_blocks = self._backend.memory().free // self._kv_spec.block_bytes
        extent = self._extent_of(config, config.memory.max_model_len or model_len, most_blocks)
        seqs = min(extent.max_seqs, extent.max_tokens)
        buckets = [Bucket("mixed", seqs, extent.max_tokens, 0)]
        if self._caps.shapes.static:
            buckets = maxima(make_buckets(self._caps, extent, config.buckets))
        kv = self._backend.alloc_kv(self._kv_spec, 1)
        with torch.inference_mode():
            for bucket in buckets:
                batch = self._blank(bucket, extent)
                self._execute(self._step(batch, kv), batch)
            if not self._caps.shapes.static:
                context = config.memory.max_model_len or model_len
                context = max(1, min(context, most_blocks * self.block_size))

                def execute(host: HostBatch) -> None:
                    batch = to_device(host, self._backend)[0]
                    self._execute(self._step(batch, kv), batch)

                run_deep_steps(execute, self._caps, extent, context)

    @torch.inference_mode()
    def _warm_up(self, progress: Progress) -> None:
        """In the mode in which steps run, or what is compiled here is compiled again there."""
        phase = "warming up"
        progress(phase, 0.0)
        self._programs.warm_up(
            lambda bucket: self._blank(bucket, self._extent),
            lambda batch: self._execute(self._programs.run(batch), batch),
            lambda share: progress(phase, share),
        )
        if not self._caps.shapes.static:
            batch = self._blank(Bucket("mixed", 1, 2, 0), self._extent)
            self._execute(self._step(batch, self._kv), batch)
        self._backend.synchronize()

    def _blank(self, bucket: Bucket, extent: Extent) -> StepBatch:
        width = extent.max_blocks
        if self._caps.shapes.kv_axis == "per_seq":
            width = max(1, bucket.kv_blocks)
        elif not self._caps.shapes.static and self._caps.graphs == "none":
            width = 1 + bucket.tokens // bucket.seqs // self.block_size
        host = blank_batch(
            bucket, width, uniform_q=self._caps.shapes.uniform_q, max_len=self._table_len
        )
        return to_device(host, self._backend)[0]

    def _execute(self, logits: Tensor, batch: StepBatch) -> None:
        drawn = logits if self._pooler is None else self._pooler.try_out(logits, self._backend)
        if drawn is not None:
            try_draws(self._sampler, self._backend, drawn, batch)

    # ---- a step ------------------------------------------------------------------------------

    @typed_steps
    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch the step; see plan.StepRunner."""
        with torch.inference_mode():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> Callable[[], StepResult]:
        self._take_lessons()
        for request_id in plan.forget:
            self._requests.pop(request_id, None)
        for new in plan.new:
            self._requests[new.request_id] = self._introduce(new)
        states = [self._requests[row.request_id] for row in plan.rows]
        partial = PartialStep(plan, states)
        shares: list[Share] = []
        for i, (row, state) in enumerate(zip(plan.rows, states, strict=True)):
            if row.new_block_ids:
                state.hold(row.new_block_ids)
            state.mask = row.mask
            if self._computable(row, state, partial):
                shares.append(self._share(i, row, state))
        if self._log is not None:
            self._log.note(shares)
        previous, self._previous = self._previous, []
        lost, self._fed = self._fed, []
        feedback: dict[int, int] = {}
        offset = 0
        try:
            for launch in split(shares, self._caps, self._extent):
                offset = self._launch(launch, states, previous, partial, feedback, offset)
        finally:
            for state in lost:
                state.feedback = None
        for index, at in feedback.items():
            states[index].feedback = at
            self._fed.append(states[index])
        return self._waiter(partial)

    def _introduce(self, new: NewRequest) -> RequestState:
        """State of a new request; what cannot be served is told by the results of its rows."""
        state = RequestState(new, self.block_size)
        most = self._caps.sample_max_top_k
        if most is not None and new.params.top_k > most:
            text = f"top_k {new.params.top_k}: this device draws from {most} at most."
            state.refused = Refusal(message=text, param="top_k")
        if new.params.logits_processor is not None:
            try:
                state.processor = self._sampler.make_processor(new.params)
            except RequestError as error:
                state.refused = Refusal.of(error)
        return state

    def _take_lessons(self) -> None:
        while self._lessons:
            for state, token_ids, mu in self._lessons.popleft():
                state.learn(token_ids, mu)

    def _share(self, index: int, row: Row, state: RequestState) -> Share:
        start = row.num_computed
        in_prompt = start < state.num_prompt - 1
        scored = (in_prompt and state.params.prompt_logprobs is not None) or (
            self._pooler is not None and self._pooler.wants_all(state)
        )
        return Share(row=index, start=start, count=row.num_new, sample=row.sample, scored=scored)

    def _computable(self, row: Row, state: RequestState, partial: PartialStep) -> bool:
        """Whether the row's request can be served and its tokens exist: not if the step that was
        to sample the last one failed.
        """
        if state.refused is not None:
            partial.fail(row.request_id, state.refused)
            return False
        missing = row.num_computed + row.num_new - state.num_known
        if missing <= 0 or (missing == 1 and state.feedback is not None):
            return True
        partial.fail(row.request_id, "The step before it failed.")
        return False

    def _launch(
        self,
        launch: Launch,
        states: Sequence[RequestState],
        previous: Sequence[Tensor],
        partial: PartialStep,
        feedback: dict[int, int],
        offset: int,
    ) -> int:
        """One program, then the sampler; gives the offset of the next launch's sampled tokens."""
        own = [states[share.row] for share in launch.shares]
        need = need_of(launch, self.block_size)
        caps = self._caps
        bucket = self._table.choose(need) or exact(need, caps)
        packed = pack(
            launch,
            own,
            bucket,
            width=table_width(bucket, need, caps, self._extent.max_blocks),
            block_size=self.block_size,
            uniform_q=caps.shapes.uniform_q,
        )
        batch = self._batch(packed, previous if packed.feeds_back else ())
        logits = self._programs.run(batch)
        if self._pooler is not None:
            drawn = self._pooler.take(launch, own, logits, partial)
            if drawn is None:
                return offset
            logits = drawn
        if launch.scored:
            share = launch.shares[0]
            partial.note_prompt(share, own[0], logits)
            logits = logits[share.count - 1 : share.count]
            draws: list[Draw | None] = [self._draw(share, own[0])]
        else:
            draws = [self._draw(s, state) for s, state in zip(launch.shares, own, strict=True)]
            draws += [None] * (bucket.seqs - len(draws))
        sampled = self._sampler(logits, draws)
        partial.note_sampled(launch, own, draws, logits, sampled)
        for i, share in enumerate(launch.shares):
            if share.sample:
                feedback[share.row] = offset + i
        self._previous.append(sampled.token_ids)
        return offset + len(draws)

    def _draw(self, share: Share, state: RequestState) -> Draw | None:
        if not share.sample:
            return None
        return Draw(
            params=state.params,
            seed=state.seed,
            position=share.start + share.count,
            num_prompt=state.num_prompt,
            history=state.history,
            processor=state.processor,
            mask=state.mask,
            mu=state.mu,
            plain=state.plain,
        )

    def _batch(self, packed: Packed, previous: Sequence[Tensor]) -> StepBatch:
        """On the device, with the tokens that the last step sampled put in their places."""
        batch, prev_row = to_device(packed.host, self._backend, packed.buffer)
        if not previous:
            return batch
        tokens = previous[0] if len(previous) == 1 else torch.cat(list(previous))
        taken = tokens[prev_row.clamp(min=0).long()].to(torch.int32)
        batch.token_ids.copy_(torch.where(prev_row >= 0, taken, batch.token_ids))
        return batch

    def _waiter(self, partial: PartialStep) -> Callable[[], StepResult]:
        wait = self._backend.fetch(partial.tensors)

        def result() -> StepResult:
            arrays = wait()
            outcome: Outcome = partial.finish(arrays)
            self._lessons.append(outcome.lessons)
            if self._pooler is None:
                return outcome.result
            return self._pooler.complete(outcome.result, partial, arrays)

        return result
