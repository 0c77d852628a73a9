"""On the CPU backend a request's tokens and log-probabilities do not depend, to the bit, on what
else the engine does.
"""

import pytest

from tokenry import LLM, SamplingParams

SHARED = "Once upon a time there was a king who had three sons, and the youngest of them was "
PROMPTS = [
    SHARED + "called Simpleton.",
    SHARED + "the bravest.",
    "The wolf",
    "In a deep forest there stood a little house, and in it lived an old woman with her cat.",
    "a",
    SHARED + "always hungry, so that his mother baked a loaf for him every day.",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=2, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=7, max_tokens=40, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=8, max_tokens=40, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=20, min_p=0.05, seed=9, max_tokens=30, logprobs=2),
    SamplingParams(
        temperature=0.7,
        seed=10,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        max_tokens=40,
        logprobs=2,
    ),
    SamplingParams(temperature=0, frequency_penalty=0.5, min_tokens=20, max_tokens=40, logprobs=2),
]


def serve(prompts, params, *, times=1, **config):
    """Token ids and their exact log-probabilities, of the last of so many rounds; and the
    preemptions.
    """
    sizes = {"max_model_len": 256, "num_kv_blocks": 256}
    config = {"backend": "cpu", "overlap": True, **sizes, **config}
    with LLM("demo", **config) as llm:
        for _ in range(times):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        return [
            (
                c.token_ids,
                [step[t].logprob for step, t in zip(c.logprobs, c.token_ids, strict=True)],
            )
            for c in completions
        ], llm.get_metrics().num_preemptions


@pytest.fixture(scope="module")
def alone():
    """Each request by itself: no batch, no chunks, no cache, no overlap."""
    found = []
    config = {"max_num_seqs": 1, "enable_prefix_caching": False, "overlap": False}
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        found += serve([prompt], [params], **config)[0]
    return found


@pytest.mark.parametrize(
    ("config", "times"),
    [
        ({}, 1),
        ({"overlap": False}, 1),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 7}, 1),
        ({"max_num_seqs": 2}, 1),
        ({}, 2),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 6}, 2),
        ({"block_size": 32}, 2),
    ],
    ids=["batched", "no overlap", "chunks", "two at once", "cached", "cached chunks", "block size"],
)
def test_same_bits_whatever_the_engine_does(alone, config, times):
    assert serve(PROMPTS, PARAMS, times=times, **config)[0] == alone


def test_same_bits_after_preemption(alone):
    got, preemptions = serve(PROMPTS, PARAMS, num_kv_blocks=12, max_model_len=160, block_size=16)
    assert preemptions > 0
    assert got == alone
