"""An engine on simulated devices that find no memory for some launches: the tokens are those of a
run without the fault, and what no device can hold ends with its figures.
"""

from __future__ import annotations

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry.backend.base import Backend
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model
from tokenry.errors import DeviceLost, DeviceOOM, StepFailed
from tokenry.plan import StepPlan, StepResult
from tokenry.runner.step_errors import HOST_ALLOCATOR, typed_steps

LIMITS = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 32,
    "num_kv_blocks": 24, "warmup": True,
}  # fmt: skip
PROMPTS = [[(7 * i * i + 3 * i + n) % VOCAB for i in range(n)] for n in (50, 1, 20, 9, 33)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=0, frequency_penalty=0.5, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=5, top_k=9, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=1, seed=6, mirostat=2, max_tokens=10, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory."""
    name, config = next(iter(FAMILIES.items()))
    return str(write_model(tmp_path_factory.mktemp("models") / name, config).path)


def serve(model, backend, *options, **how):
    """Tokens of each request, and what the engine counted."""
    with LLM(model, backend=backend, backend_option=options, **LIMITS, **how) as llm:
        done = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], PARAMS, use_tqdm=False)
        llm._assembled.engine.check_integrity()
        return [c.outputs[0].token_ids for c in done], llm.get_metrics()


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
@pytest.mark.parametrize("backend", ["sim-cuda", "sim-hpu", "sim-opaque"])
def test_tokens_are_those_of_a_run_without_the_fault(model, backend, overlap):
    want, clean = serve(model, backend, overlap=overlap)
    got, stats = serve(model, backend, "oom_at=1,4,5,9,15,16,17,30", overlap=overlap)
    assert got == want
    assert (clean.num_device_ooms, stats.num_device_ooms) == (0, 8)
    assert stats.step_failures == 0


def test_what_fits_no_step_ends_with_the_cause_and_the_engine_stays(model):
    every = ",".join(map(str, range(2, 12)))
    with LLM(model, backend="sim-cuda", backend_option=(f"oom_at={every}",), **LIMITS) as llm:
        with pytest.raises(StepFailed, match="no memory for a step of this request alone") as told:
            llm.generate([{"prompt_token_ids": PROMPTS[0]}], PARAMS[0], use_tqdm=False)
        assert "The simulated device has no memory for launch" in str(told.value)
        llm._assembled.engine.check_integrity()
        done = llm.generate([{"prompt_token_ids": PROMPTS[0]}] * 9, PARAMS[0], use_tqdm=False)
    want, _ = serve(model, "sim-cuda")
    assert {tuple(c.outputs[0].token_ids) for c in done} == {tuple(want[0])}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore advice"),
        MemoryError("Unable to allocate 3 GiB"),
        RuntimeError(f"[enforce fail] {HOST_ALLOCATOR}: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("late", [False, True], ids=["launching", "waiting"])
def test_a_lack_of_memory_is_typed_with_the_figures_wherever_it_is_met(error, late):

    class Runner:
        _backend = Backend()

        @typed_steps
        def run(self, plan):
            if not late:
                raise error
            return self.wait

        def wait(self):
            raise error

    plan = StepPlan(step=7)
    with pytest.raises(DeviceOOM, match="No memory for step 7 of 0 requests and 0 tokens") as told:
        Runner().run(plan)()
    assert "more advice" not in str(told.value)
    assert "--max-num-batched-tokens" in str(told.value.mend)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (DeviceLost("The device is lost.", mend="restart"), "The device is lost"),
        (RuntimeError("launch failure\nadvice"), "in step 1 .shapes differ. and does not answer"),
    ],
    ids=["typed", "untyped"],
)
def test_an_error_after_which_the_device_cannot_be_waited_for_is_its_loss(answer, text):
    class Lost(Backend):
        def synchronize(self):
            raise answer

    class Runner:
        _backend = Lost()

        @typed_steps
        def run(self, plan):
            raise RuntimeError("shapes differ")

    with pytest.raises(DeviceLost, match=text) as told:
        Runner().run(StepPlan(step=1))
    assert "shapes differ" in str(told.value.__cause__)
    assert "restart" in str(told.value.mend)


def test_other_errors_and_results_pass():
    class Runner:
        _backend = Backend()

        @typed_steps
        def run(self, plan):
            if plan.step == 1:
                raise RuntimeError("shapes differ")
            return lambda: StepResult(step=plan.step)

    with pytest.raises(RuntimeError, match="shapes differ"):
        Runner().run(StepPlan(step=1))
    assert Runner().run(StepPlan(step=2))() == StepResult(step=2)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_a_run_without_the_fault(model, pooling):
    """A pooled request begins anew: the sum of its rows so far cannot be taken back."""

    def vectors(*options):
        limits = {**LIMITS, "max_num_batched_tokens": 16, "task": "embed", "pooling": pooling}
        with LLM(model, backend="sim-cuda", backend_option=options, **limits) as llm:
            found = llm.embed(PROMPTS, use_tqdm=False)
            return torch.tensor([v.outputs.embedding for v in found]), llm.get_metrics()

    want, _ = vectors()
    got, stats = vectors("oom_at=2,3,6,9,11,15")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (stats.num_device_ooms, stats.step_failures) == (6, 0)
