"""Quantised weights, from the flag to the text, on the demo model."""

from __future__ import annotations

import math

import pytest

from tokenry import LLM, SamplingParams
from tokenry.errors import ConfigError

TEXT = (
    "Once upon a time there was a king who had a daughter. She was so beautiful that the sun, "
    "who had seen so many things, wondered whenever he shone upon her face. Close by the castle "
    "lay a great dark forest, and in the forest, under an old tree, was a well."
)


def perplexity(**config):
    llm = LLM("demo", backend="cpu", max_model_len=256, **config)
    (output,) = llm.generate(
        [TEXT], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )
    llm.close()
    scored = output.prompt_logprobs[1:]
    total = sum(
        entry[token].logprob
        for entry, token in zip(scored, output.prompt_token_ids[1:], strict=True)
    )
    return math.exp(-total / len(scored))


def test_quantised_weights_keep_the_quality_of_the_text():
    exact = perplexity()
    for format, limit in (("int8", 1.01), ("int4", 1.06)):
        quantised = perplexity(quantization=format)
        assert quantised != exact
        assert quantised < limit * exact


def test_a_backend_without_quantised_weights_refuses():
    with pytest.raises(ConfigError, match="--quantization int8: the sim-hpu backend has none"):
        LLM("demo", backend="sim-hpu", quantization="int8")
