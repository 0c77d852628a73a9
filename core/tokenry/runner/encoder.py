"""Runs plans of a bidirectional encoder: whole texts in, one vector each out.

In: StepPlan, whose rows are whole prompts (an encoder's prompt is never chunked and holds no
blocks). Out: a function that waits for the StepResult. There is no KV, no sampler and no state
between steps. Texts of a launch are padded to one length: on a static device that of a warmed
bucket, elsewhere the next rung of a ladder, which only the text's own length decides, so that a
text's vector never depends on its neighbours. Knows nothing of queues, text or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Backend, ModelSpec, StepBatch, WeightIter
from tokenry.backend.contract import Bucket, HostBatch, IntArray, KVSpec, PhaseRules
from tokenry.backend.ops import OpTable
from tokenry.errors import ConfigError
from tokenry.plan import NewRequest, RowResult, StepPlan, StepResult
from tokenry.pooling import PoolingParams
from tokenry.runner.bucket_grid import deviations, make_buckets
from tokenry.runner.buckets import BucketTable, need_of
from tokenry.runner.memory import MemoryPlan
from tokenry.runner.pack import to_device
from tokenry.runner.pooling import PooledHead, pooled_result
from tokenry.runner.programs import Programs
from tokenry.runner.runner import Progress, RunnerConfig
from tokenry.runner.shapes import Extent, Launch, Share, split
from tokenry.runner.step_errors import typed_steps
from tokenry.runner.step_log import StepLog

TOKEN_TYPES = "token_types"
"""Name in `HostBatch.extra`, as models/encoder.py reads it."""
RUNGS = ((128, 16), (512, 32), (2048, 64))
"""Texts up to so many tokens are padded to the next multiple of that; longer ones of 128."""


def rung(num_tokens: int) -> int:
    """Length that a text is padded to on a device without buckets: at most a fifth of it is padding
    from 65 tokens on.
    """
    step = next((step for most, step in RUNGS if num_tokens <= most), 128)
    return -(-num_tokens // step) * step


class EncoderShape(ModelSpec, Protocol):
    """An encoder's spec."""

    @property
    def has_token_types(self) -> bool:
        """Whether a step reads which text of a pair a token is of."""


class EncoderRunner:
    """A StepRunner (see plan.py) over one backend, for a model without KV."""

    block_size = 1

    def __init__(
        self,
        backend: Backend,
        spec: EncoderShape,
        weights: WeightIter,
        config: RunnerConfig,
        *,
        head: PooledHead,
        progress: Progress = lambda phase, share: None,
    ) -> None:
        _check(config)
        self._backend, self._head = backend, head
        self._has_types = spec.has_token_types
        self._caps = replace(
            backend.caps,
            shapes=replace(backend.caps.shapes, uniform_q=True, kv_axis="none"),
            phases=PhaseRules(
                mixed=False,
                chunked=False,
                max_prefill_seqs=backend.caps.phases.max_prefill_seqs,
            ),
        )
        self._ops = OpTable(backend.ops(), config.quantization)
        self._log = StepLog(config.record_steps) if config.record_steps is not None else None
        progress("loading weights", 0.0)
        used_before = backend.memory().used
        step = backend.build_model(spec, weights, self._ops)
        used = backend.memory().used
        size = backend.caps.block_sizes[0]
        none = KVSpec(num_layers=0, num_kv_heads=1, head_dim=1, block_size=size, dtype=spec.dtype)
        kv = backend.alloc_kv(none, 1)  # of no layer: some devices want it before they compile
        limits = config.memory
        self._extent = Extent(
            max_seqs=limits.max_num_seqs,
            max_tokens=max(limits.max_num_batched_tokens, spec.max_model_len),
            max_blocks=1,
            block_size=spec.max_model_len,
        )
        made = make_buckets(self._caps, self._extent, config.buckets)
        buckets = [b for b in made if b.phase == "prefill" and b.logits == "last"]
        self._notes = deviations(self._caps, config.buckets, made)
        self._programs = Programs(backend, lambda batch: step(batch, kv), buckets)
        self._warm_up(progress, always=config.warmup)
        self._table = BucketTable(self._programs.buckets, self._caps, config.buckets.block_price)
        ledger = {"runtime": used_before, "weights": used - used_before}
        self.plan = MemoryPlan(
            num_blocks=0,
            max_model_len=spec.max_model_len,
            ledger={**ledger, "activations": max(0, backend.memory().used - used)},
            notes=(),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the start-up log."""
        late = (self._programs.note,) if self._programs.note is not None else ()
        return (*self._notes, *late)

    def stats(self) -> tuple[int, int, dict[str, int]]:
        """Programs, launches that ran uncompiled, ops that fell back to the reference."""
        return len(self._programs), self._programs.uncompiled_launches, dict(self._ops.fallbacks)

    def compile_count(self) -> int:
        """The backend's own count of programs made."""
        return self._backend.compile_count()

    # ---- the start ---------------------------------------------------------------------------

    @torch.inference_mode()
    def _warm_up(self, progress: Progress, *, always: bool) -> None:
        """On static devices every program; elsewhere the largest steps, so that memory that is
        missing is missed now.
        """
        phase = "warming up"
        progress(phase, 0.0)
        self._programs.warm_up(
            self._blank,
            self._try,
            lambda share: progress(phase, share),
        )
        if always and not self._caps.shapes.static:
            longest = rung(self._extent.block_size or 1)
            for length in (longest, RUNGS[0][1]):
                seqs = min(max(1, self._extent.max_tokens // length), self._extent.max_seqs)
                bucket = Bucket("prefill", seqs, seqs * length, 0)
                self._try(self._blank(bucket))
        self._backend.synchronize()

    def _try(self, batch: StepBatch) -> None:
        """As a step does it, so that a device that compiles knows all of it."""
        self._backend.fetch([self._programs.run(batch).clone()])()

    def _blank(self, bucket: Bucket) -> StepBatch:
        """Texts as long as the bucket allows."""
        length = min(bucket.tokens // bucket.seqs, self._extent.block_size or 1)
        text = np.zeros(length, np.int32)
        return self._batch([(text, None)] * bucket.seqs, bucket)

    # ---- a step ------------------------------------------------------------------------------

    @typed_steps
    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch the step; see plan.StepRunner."""
        with torch.inference_mode():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> Callable[[], StepResult]:
        new = {request.request_id: request for request in plan.new}
        requests = [new[row.request_id] for row in plan.rows]
        shares = [
            Share(row=i, start=0, count=len(request.token_ids), sample=False)
            for i, request in enumerate(requests)
        ]
        if self._log is not None:
            self._log.note(shares)
        outputs: list[Tensor] = []
        places: dict[int, tuple[int, int]] = {}
        for launch in self._launches(shares):
            for i, share in enumerate(launch.shares):
                places[share.row] = (len(outputs), i)
            texts = [_text(requests[share.row]) for share in launch.shares]
            # a copy: a replayed program writes its next output to the same place
            outputs.append(self._programs.run(self._batch(texts, self._bucket(launch))).clone())
        wait = self._backend.fetch(outputs)

        def result() -> StepResult:
            arrays = wait()
            rows = [self._row(request, arrays, places[i]) for i, request in enumerate(requests)]
            return StepResult(step=plan.step, rows=tuple(rows))

        return result

    def _launches(self, shares: Sequence[Share]) -> Iterator[Launch]:
        """Texts of like length together; on a device without buckets, of one padded length."""
        if self._caps.shapes.static:
            yield from split(sorted(shares, key=lambda s: s.count), self._caps, self._extent)
            return
        by_rung: dict[int, list[Share]] = {}
        for share in shares:
            by_rung.setdefault(rung(share.count), []).append(share)
        for length, same in by_rung.items():
            most = max(1, self._extent.max_tokens // length)
            most = min(most, self._caps.phases.max_prefill_seqs or most)
            for at in range(0, len(same), most):
                yield Launch(phase="prefill", shares=tuple(same[at : at + most]))

    def _bucket(self, launch: Launch) -> Bucket:
        bucket = self._table.choose(need_of(launch, self._extent.block_size or 1))
        if bucket is not None:
            return bucket
        seqs, length = len(launch.shares), rung(launch.shares[0].count)
        return Bucket("prefill", seqs, seqs * length, 0)

    def _batch(self, texts: Sequence[tuple[IntArray, int | None]], bucket: Bucket) -> StepBatch:
        """Texts, each with where its second half begins, right-padded; rows without a text are
        empty.
        """
        S, T = bucket.seqs, bucket.tokens
        length = T // S
        ids, positions, types = np.zeros((3, S, length), np.int32)
        lens = np.zeros(S, np.int32)
        at = np.arange(length, dtype=np.int32)
        for i, (text, second) in enumerate(texts):
            n = lens[i] = len(text)
            ids[i, :n], positions[i, :n] = text, at[:n]
            if second is not None:
                types[i, second:n] = 1
        zeros = np.zeros(T, np.int32)
        host = HostBatch(
            bucket=bucket,
            token_ids=ids.reshape(-1),
            positions=positions.reshape(-1),
            slots=zeros,
            prev_row=np.full(T, -1, np.int32),
            q_start=np.arange(S + 1, dtype=np.int32) * length,
            q_lens=lens,
            seq_lens=lens,
            block_table=np.zeros((S, 1), np.int32),
            logit_rows=zeros[:S],
            extra={TOKEN_TYPES: types.reshape(-1)} if self._has_types else {},
        )
        return to_device(host, self._backend)[0]

    def _row(
        self, request: NewRequest, arrays: Sequence[NDArray[Any]], place: tuple[int, int]
    ) -> RowResult:
        params = request.pooling or PoolingParams()
        return pooled_result(request.request_id, self._head, arrays[place[0]][place[1]], params)


def _text(request: NewRequest) -> tuple[IntArray, int | None]:
    second = None if request.pooling is None else request.pooling.second_text
    return np.array(request.token_ids, np.int32), second


def _check(config: RunnerConfig) -> None:
    """Options of a KV cache mean nothing here, and nothing is dropped in silence."""
    memory = config.memory
    given = {
        "--num-kv-blocks": memory.num_kv_blocks,
        "--kv-cache-bytes": memory.kv_cache_bytes,
        "--block-size": config.block_size,
    }
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{flag} {value}: a bidirectional encoder has no KV cache.",
                mend=f"leave {flag} out",
            )
