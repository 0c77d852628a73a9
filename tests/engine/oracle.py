"""A runner without a device that is the oracle of the engine: it knows what every KV slot holds.

Its "model" draws the next token from a hash of all tokens before it. It computes that hash only
from the simulated KV,
so a block that was handed out twice, read before it was written, or found under a wrong hash
changes the tokens or
raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.errors import DeviceOOM
from tokenry.messages import AddRequest, TokensEvent
from tokenry.params import SamplingParams
from tokenry.plan import NewRequest, Row, RowResult, StepPlan, StepResult, TokenLogprobs

VOCAB = 50
EOS = 1


def next_token(tokens: Iterable[int], seed: int = 0) -> int:
    """What the model draws after these tokens."""
    digest = hashlib.blake2b(repr((tuple(tokens), seed)).encode(), digest_size=4).digest()
    return 2 + int.from_bytes(digest, "little") % (VOCAB - 2)


def expected(message: AddRequest, max_model_len: int = 10**6) -> list[int]:
    """The tokens that the request must get, from the definition alone."""
    tokens = list(message.token_ids)
    params = message.params
    room = params.max_tokens if params.max_tokens is not None else max_model_len
    end = min(len(tokens) + room, max_model_len)
    while len(tokens) < end:
        tokens.append(next_token(tokens, params.seed or 0))
        if len(tokens) - len(message.token_ids) < params.min_tokens:
            continue
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(message.token_ids) :]


@dataclass
class Held:
    """What the runner keeps of a request."""

    tokens: list[int]
    num_prompt: int
    seed: int
    params: SamplingParams
    block_ids: list[int]


@dataclass
class OracleRunner:
    """Runs plans against a dict of slots. `fail_at`: steps that raise; `bad_rows`: ids whose row
    reports an error; `oom_at`: steps without device memory, which they find before or in the middle
    of their rows, or when the result is waited for.
    """

    block_size: int
    fail_at: frozenset[int] = frozenset()
    bad_rows: frozenset[str] = frozenset()
    oom_at: Mapping[int, str] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)
    kv: dict[int, tuple[int, int]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    most_tokens: int = 0

    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        self.plans.append(plan)
        self.most_tokens = max(self.most_tokens, plan.num_tokens)
        for request_id in plan.forget:
            self.held.pop(request_id, None)
            self.broken.discard(request_id)
        for new in plan.new:
            self._introduce(new)
        if plan.step in self.fail_at:
            self.broken |= {row.request_id for row in plan.rows}
            raise RuntimeError(f"planted failure in step {plan.step}")
        oom = self.oom_at.get(plan.step)
        if oom in ("before", "middle"):
            for row in plan.rows[: len(plan.rows) // 2] if oom == "middle" else ():
                self._row(row)
            self.broken |= {row.request_id for row in plan.rows}
            raise DeviceOOM(f"planted in step {plan.step}")
        rows = tuple(self._row(row) for row in plan.rows)
        result = StepResult(step=plan.step, rows=rows)

        def wait() -> StepResult:
            if oom is not None:
                raise DeviceOOM(f"planted in the result of step {plan.step}")
            return result

        return wait

    def _introduce(self, new: NewRequest) -> None:
        assert new.request_id not in self.held, f"{new.request_id} introduced twice"
        self.held[new.request_id] = Held(
            list(new.token_ids), new.num_prompt, new.seed, new.params, list(new.block_ids)
        )

    def _slot(self, held: Held, position: int) -> int:
        block_id = held.block_ids[position // self.block_size]
        assert block_id != 0, "the null block was handed out"
        return block_id * self.block_size + position % self.block_size

    def _row(self, row: Row) -> RowResult:
        if row.request_id in self.broken:
            return RowResult(request_id=row.request_id, error="its last step failed")
        held = self.held[row.request_id]
        held.block_ids.extend(row.new_block_ids)
        end = row.num_computed + row.num_new
        assert row.num_new > 0 and end <= len(held.tokens), f"{row} has no tokens to compute"
        for position in range(row.num_computed, end):
            self.kv[self._slot(held, position)] = (position, held.tokens[position])
        seen = []
        for position in range(end):
            at, token = self.kv[self._slot(held, position)]
            assert at == position, (
                f"{row.request_id}: slot of position {position} holds that of {at}"
            )
            seen.append(token)
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if held.params.prompt_logprobs is not None:
            about = range(row.num_computed + 1, min(end + 1, held.num_prompt))
            prompt_logprobs = tuple(
                TokenLogprobs(token_ids=(held.tokens[p],), logprobs=(-1.0,), rank=1) for p in about
            )
        if row.request_id in self.bad_rows:
            self.broken.add(row.request_id)
            return RowResult(request_id=row.request_id, error="NaN logits")
        if not row.sample:
            return RowResult(request_id=row.request_id, prompt_logprobs=prompt_logprobs)
        assert end == len(held.tokens)
        token = next_token(seen, held.params.seed or 0)
        held.tokens.append(token)
        return RowResult(
            request_id=row.request_id, token_ids=(token,), prompt_logprobs=prompt_logprobs
        )


def limits(**changes: object) -> EngineLimits:
    """Small limits, with changes."""
    values: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        **changes,
    }
    return EngineLimits(**values)  # type: ignore[arg-type]


def request(request_id: str, prompt: Iterable[int], **params: object) -> AddRequest:
    """A request with sampling parameters."""
    own = {k: params.pop(k) for k in ("priority", "cache_salt", "eos_token_ids") if k in params}
    values = {"max_tokens": 8, "seed": 0, **params}
    return AddRequest(
        request_id=request_id, token_ids=tuple(prompt), params=SamplingParams(**values), **own
    )


def drain(engine: EngineCore, *, most_steps: int = 20_000) -> dict[str, list[TokensEvent]]:
    """Step until no work is left, checking the books after every step; events by request."""
    events: dict[str, list[TokensEvent]] = {}
    for _ in range(most_steps):
        if not engine.has_work():
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
    raise AssertionError(f"still at work after {most_steps} steps")


def tokens_of(events: list[TokensEvent]) -> list[int]:
    """All tokens of a request's events, which must end exactly once, at the end."""
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    return [t for e in events for t in e.token_ids]
