"""A device that cannot continue a prompt gets whole prompts, and says what that costs."""

import pytest

from tokenry import LLM, SamplingParams
from tokenry.assemble import assemble
from tokenry.config import EngineConfig
from tokenry.engine.limits import EngineLimits
from tokenry.errors import ContextLengthExceeded

TEXTS = ["Once upon a time there was a king", "The wolf", "In a deep forest " * 4, "a"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64}


def texts(backend, **config):
    with LLM("demo", backend=backend, **{**SMALL, **config}) as llm:
        outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs], llm.get_metrics(), llm.ready


def test_whole_prompts_give_the_same_tokens_after_preemptions_too():
    """More tokens than the step's budget are to be resumed: the device refuses chunks."""
    want, _, _ = texts("cpu", max_model_len=128)
    got, metrics, ready = texts("sim-whole", max_model_len=128, num_kv_blocks=10)
    assert metrics.num_preemptions > 0
    assert metrics.step_failures == 0
    assert got == want
    assert any("max_num_batched_tokens = 128" in note for note in ready.notes)


def test_a_longer_context_that_is_asked_for_widens_the_step():
    config = EngineConfig(
        model="demo", backend="sim-whole", max_model_len=256, num_kv_blocks=40, **SMALL
    )
    made = assemble(config)
    assert made.ready.max_model_len == 256
    assert made.config.max_num_batched_tokens == 256
    made.engine.close()


@pytest.mark.parametrize(
    ("backend", "chunks"), [("sim-whole", True), ("cpu", False)], ids=["device", "configured"]
)
def test_without_one_the_context_is_fitted_to_the_step_and_told(backend, chunks):
    config = EngineConfig(
        model="demo", backend=backend, num_kv_blocks=40, enable_chunked_prefill=chunks, **SMALL
    )
    made = assemble(config)
    assert made.ready.max_model_len == 64
    note = next(note for note in made.ready.notes if note.startswith("max_model_len = 64: "))
    assert "--max-model-len" in note
    made.engine.close()


@pytest.mark.parametrize("model_len", [None, 24, 96], ids=["fitted", "narrower", "wider"])
def test_a_prompt_that_would_need_two_steps_is_beyond_the_context(model_len):
    with LLM(
        "demo", backend="cpu", enable_chunked_prefill=False, max_model_len=model_len, **SMALL
    ) as llm:
        context = llm.ready.max_model_len
        assert context == (model_len or 64)
        one = SamplingParams(max_tokens=1)
        with pytest.raises(ContextLengthExceeded, match=f"{context}"):
            llm.generate({"prompt_token_ids": [5] * context}, one, use_tqdm=False)
        (answer,) = llm.generate({"prompt_token_ids": [5] * (context - 1)}, one, use_tqdm=False)
        assert len(answer.outputs[0].token_ids) == 1


def test_limits_that_would_need_a_chunk_cannot_be_made():
    with pytest.raises(AssertionError, match="whole"):
        EngineLimits(
            num_blocks=8, block_size=16, max_model_len=64, max_num_seqs=4,
            max_num_batched_tokens=63, chunked_prefill=False,
        )  # fmt: skip
