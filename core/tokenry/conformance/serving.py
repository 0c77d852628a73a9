"""Checks of a backend under the core's own runner and engine: long random service, tokens fed back
on the device, whole answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenry.backend.contract import Caps
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.kit import Kit
from tokenry.conformance.stepping import texts_of
from tokenry.conformance.tiny import FAMILIES, MAX_LEN, VOCAB
from tokenry.llm import LLM
from tokenry.params import SamplingParams
from tokenry.plan import NewRequest, Row, StepPlan, StepResult
from tokenry.runner.memory import MemoryLimits
from tokenry.runner.runner import ModelRunner, RunnerConfig

GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
WAYS = (
    GREEDY,
    SamplingParams(temperature=0.8, top_k=20),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    SamplingParams(temperature=0, prompt_logprobs=1),
)
CONTEXT, BLOCKS = 96, 48
NUM_TOKENS = 20
MARGIN = 0.05
"""Where the best two logits of the reference are this close (as a share of their scale, times 10
below float32), either token is right."""


def make_runner(kit: Kit) -> ModelRunner:
    """The core's runner on a fresh backend, warmed up."""
    spec = kit.spec()
    limits = MemoryLimits(
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=CONTEXT,
        memory_fraction=0.5,
        num_kv_blocks=BLOCKS,
    )
    return ModelRunner(
        kit.open(), spec, spec.weights(lambda share: None), RunnerConfig(memory=limits)
    )


@dataclass(slots=True)
class Live:
    """A request as the driver sees it."""

    known: int
    prompt: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class Driver:
    """Plans steps by hand, as a scheduler would. Owned by one check."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.live: dict[str, Live] = {}
        self._free = list(range(runner.plan.num_blocks - 1, 0, -1))
        self._new: dict[str, NewRequest] = {}
        self._forget: list[str] = []
        self._step = 0

    def add(self, name: str, tokens: Sequence[int], params: SamplingParams = GREEDY) -> None:
        """A request that has not started."""
        self.live[name] = Live(len(tokens), len(tokens))
        self._new[name] = NewRequest(
            request_id=name, token_ids=tuple(tokens), num_prompt=len(tokens), params=params, seed=7
        )

    def drop(self, name: str) -> None:
        """End a request; its blocks are for others."""
        self._free += self.live.pop(name).blocks
        if self._new.pop(name, None) is None:
            self._forget.append(name)

    def launch(self, shares: dict[str, int]) -> Callable[[], StepResult]:
        """Run a step of so many tokens of each request."""
        rows = []
        for name, count in shares.items():
            live = self.live[name]
            end = live.computed + count
            missing = -(-end // self.runner.block_size) - len(live.blocks)
            ids = tuple(self._free.pop() for _ in range(missing))
            live.blocks += ids
            rows.append(
                Row(
                    request_id=name, num_computed=live.computed, num_new=count,
                    new_block_ids=ids, sample=end == live.known,
                )
            )  # fmt: skip
            live.computed = end
            live.known += end == live.known
        self._step += 1
        new = tuple(self._new.pop(name) for name in shares if name in self._new)
        plan = StepPlan(step=self._step, new=new, rows=tuple(rows), forget=tuple(self._forget))
        self._forget = []
        return self.runner.run(plan)


def _compiled_graphs() -> int:
    """Graphs that torch's compiler has made in this process, 0 if it was never loaded."""
    module: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if module is None else int(module.counters["stats"]["unique_graphs"])


@check(
    "C10.recompile", "After warm-up nothing is compiled, and nothing runs outside a warmed bucket."
)
def recompile(kit: Kit) -> Iterator[Case]:
    """Random legal steps (1000, or --steps): requests come, continue in chunks, decode, end early,
    are preempted and come again, with five ways to draw; compile_count and the graphs of torch's
    compiler stand still, and no row fails. A device with programs has counted those of the warm-up.
    """
    graphs = _compiled_graphs()
    runner = make_runner(kit)
    made, programs = runner.compile_count(), runner.stats()[0]
    warmed = _compiled_graphs()
    if kit.caps.graphs != "none":
        yield attempt(
            f"warm-up of {programs} programs",
            lambda: (
                None
                if made + warmed - graphs >= programs
                else f"compile_count says {made} after {programs} programs were made"
            ),
        )
    driver, rng = Driver(runner), np.random.default_rng(1)
    for at in range(kit.steps):
        shares = _random_step(driver, rng, kit.caps, at)
        if not shares:
            continue
        label = f"step {at + 1}: {' '.join(f'{n}+{c}' for n, c in shares.items())}"

        def one(shares: dict[str, int] = shares) -> str | None:
            result = driver.launch(shares)()
            errors = [row.error for row in result.rows if row.error is not None]
            if errors:
                return f"a row failed: {errors[0]}"
            if runner.compile_count() != made:
                return f"compile_count went from {made} to {runner.compile_count()}"
            if _compiled_graphs() != warmed:
                return f"torch's compiler made {_compiled_graphs() - warmed} more graphs"
            return None

        case = attempt(label, one)
        yield case
        if case.failure is not None:
            return
    if kit.caps.shapes.static:
        stray = runner.stats()[1]
        yield attempt("launches", lambda: f"{stray} ran uncompiled" if stray else None)


def _random_step(driver: Driver, rng: np.random.Generator, caps: Caps, at: int) -> dict[str, int]:
    for name in list(driver.live):
        live = driver.live[name]
        if live.known >= CONTEXT - 1 or rng.random() < 0.02:
            driver.drop(name)
    while len(driver.live) < 4 and rng.random() < 0.7:
        tokens = rng.integers(2, VOCAB, rng.integers(1, 60)).tolist()
        driver.add(f"r{at}.{len(driver.live)}", tokens, WAYS[int(rng.integers(len(WAYS)))])
    shares: dict[str, int] = {}
    budget = 32
    for name in rng.permutation(sorted(driver.live)):
        live = driver.live[str(name)]
        missing = live.known - live.computed
        if caps.phases.chunked:
            missing = min(missing, int(rng.integers(1, 33)), budget)
        elif missing > budget:
            if missing > 32:
                driver.drop(str(name))
            continue
        if missing and rng.random() < 0.9:
            shares[str(name)] = missing
            budget -= missing
    return shares


def feeds_back(caps: Caps) -> str | None:
    """Asked where the next step can take its tokens from the device."""
    return None if caps.token_feedback else "Caps.token_feedback is False"


@check(
    "C16.feedback",
    "A step that is launched before the last one was waited for draws the same tokens.",
    asked=feeds_back,
)
def feedback(kit: Kit) -> Iterator[Case]:
    """32 decode steps of three requests, each launched while the one before is under way, against
    the same steps waited for one by one.
    """
    texts = texts_of(3, 20, seed=4)

    def tokens(overlap: bool) -> list[tuple[int, ...]]:
        driver = Driver(make_runner(kit))
        for i, text in enumerate(texts):
            driver.add(str(i), text[: 8 + i])
            driver.launch({str(i): 8 + i})()
        drawn: list[list[int]] = [[], [], []]
        waiting: list[Callable[[], StepResult]] = []
        for _ in range(32):
            waiting.append(driver.launch({"0": 1, "1": 1, "2": 1}))
            while len(waiting) > overlap:
                for i, row in enumerate(waiting.pop(0)().rows):
                    drawn[i] += row.token_ids or (-1,)
        for wait in waiting:
            for i, row in enumerate(wait().rows):
                drawn[i] += row.token_ids or (-1,)
        return [tuple(d) for d in drawn]

    def compare() -> str | None:
        got, want = tokens(overlap=True), tokens(overlap=False)
        for i in range(3):
            if got[i] != want[i]:
                at = next(k for k in range(32) if got[i][k] != want[i][k])
                return f"request {i} drew {got[i][at]} in step {at}, {want[i][at]} when waited for"
        return None

    yield attempt("32 steps of 3 requests", compare)


@check("C17.end_to_end", "Served whole, a model gives the reference's greedy tokens.")
def end_to_end(kit: Kit) -> Iterator[Case]:
    """Three families through LLM: all at once; in chunks; with a prefix cache that hits; with so
    little KV that requests are preempted. Tokens equal those of the model on the host, each
    computed from the whole text anew; where its best two are nearly equal, either is right.
    """
    shared = texts_of(1, 36, seed=8)[0]
    prompts = [*texts_of(2, 21, seed=9), [*shared, 5, 9], [*shared, 7], [11]]
    settings: dict[str, dict[str, Any]] = {"all at once": {}}
    if kit.caps.phases.chunked:
        settings["chunks, prefix cache"] = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    if 16 in kit.caps.block_sizes:
        settings["preemption"] = {"num_kv_blocks": 8, "block_size": 16}
    for family in FAMILIES:
        for name, options in settings.items():
            yield attempt(f"{family}: {name}", _served, kit, family, prompts, options)
        last = list(settings)[-2:][0]  # the other families need not see every way to serve
        settings = {last: settings[last]}


def _served(
    kit: Kit, family: str, prompts: Sequence[Sequence[int]], options: dict[str, Any]
) -> str | None:
    config: dict[str, Any] = {
        "backend": kit.name,
        "backend_option": tuple(f"{k}={v}" for k, v in kit.options.items()),
        "dtype": kit.dtype,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_kv_blocks": 64,
        **options,
    }
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(kit.model(family).path), progress=False, **config) as llm:
        for turn in range(2):
            outputs = llm.generate([list(p) for p in prompts], params, use_tqdm=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                wrong = _wrong_token(kit, family, prompt, output.outputs[0].token_ids)
                if wrong is not None:
                    return f"{wrong} (round {turn + 1})"
        preempted = llm.get_metrics().num_preemptions
    if "num_kv_blocks" in options and not preempted:
        return "no request was preempted: the check did not try what it should"
    return None


def _wrong_token(kit: Kit, family: str, prompt: Sequence[int], tokens: Sequence[int]) -> str | None:
    """The first token that is not (nearly) the reference's best after what came before it."""
    if len(tokens) != NUM_TOKENS:
        return f"{len(tokens)} tokens came, {NUM_TOKENS} were asked for"
    text = [*prompt, *tokens]
    logits = kit.model(family).logits(text[:-1])[len(prompt) - 1 :]
    margin = MARGIN if kit.dtype == "float32" else 10 * MARGIN
    for at, token in enumerate(tokens):
        row = logits[at]
        if row.max() - row[token] > margin * 0.1 * float(np.abs(row).max()):
            return (
                f"prompt of {len(prompt)} tokens: token {at + 1} is {token} (logit "
                f"{row[token]:.4f}), the reference's best is {int(row.argmax())} ({row.max():.4f})"
            )
    return None


CHECKS: tuple[Check, ...] = (recompile, feedback, end_to_end)
assert MAX_LEN >= CONTEXT
