"""Answers of a shape from the offline API: the real model, the real grammars, a crowded engine."""

import json
import re
from pathlib import Path

import pytest

from tokenry.errors import RequestError
from tokenry.llm import LLM
from tokenry.params import SamplingParams
from tokenry.structured import StructuredOutputs

SIZES = {"backend": "cpu", "max_model_len": 256, "block_size": 16, "progress": False}
SCHEMA = {
    "type": "object",
    "properties": {"who": {"type": "string", "maxLength": 30}, "age": {"enum": [7, 70]}},
    "required": ["who", "age"],
    "additionalProperties": False,
}
PROMPTS = ["Once upon a time", "The king was old", "A little girl", "In the wood"]


def params(i, **values):
    """Bound and free ones in turn, each with its own seed."""
    shape = StructuredOutputs(json=SCHEMA) if i % 2 == 0 else None
    return SamplingParams(max_tokens=120, seed=i, logprobs=1, structured_outputs=shape, **values)


def texts(llm, prompts, all_params):
    outputs = llm.generate(prompts, all_params, use_tqdm=False)
    llm._engine.check_integrity()
    return [(o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]


@pytest.fixture(scope="module")
def alone():
    """What each prompt gives by itself."""
    with LLM("demo", num_kv_blocks=64, **SIZES) as llm:
        yield [texts(llm, prompt, params(i))[0] for i, prompt in enumerate(PROMPTS * 2)]


def test_alone_the_bound_answers_are_json(alone):
    for text, finish in alone[::2]:
        assert finish == "stop"
        assert json.loads(text)["age"] in (7, 70)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_kv_blocks": 64, "overlap": True},
        {"num_kv_blocks": 20, "overlap": True},
        {"num_kv_blocks": 64, "overlap": True, "max_num_batched_tokens": 8, "max_num_seqs": 4},
        {"num_kv_blocks": 64, "overlap": False, "enable_prefix_caching": False},
    ],
    ids=["roomy", "preempted", "chunked", "no overlap"],
)
def test_in_a_crowd_every_answer_is_as_alone(alone, sizes):
    with LLM("demo", **SIZES | sizes) as llm:
        prompts = PROMPTS * 2
        assert texts(llm, prompts, [params(i) for i in range(len(prompts))]) == alone
        if sizes["num_kv_blocks"] == 20:
            assert llm.get_metrics().num_preemptions > 0
        again = texts(llm, prompts, [params(i) for i in range(len(prompts))])  # cached beginnings
        assert again == alone


def test_several_completions_of_one_prompt_are_bound_each():
    with LLM("demo", num_kv_blocks=64, **SIZES) as llm:
        wanted = {"regex": "[a-z]{3,9}( [a-z]{3,9}){2}"}
        asked = SamplingParams(n=4, max_tokens=60, seed=1, structured_outputs=wanted)
        outputs = llm.generate("Once", asked, use_tqdm=False)[0].outputs
        assert len({o.text for o in outputs}) > 1
        for output in outputs:
            assert re.fullmatch(wanted["regex"], output.text)
        with pytest.raises(RequestError, match="look-around"):
            bad = SamplingParams(structured_outputs={"regex": "(?!a)b"})
            llm.generate("Once", bad, use_tqdm=False)
        nothing = SamplingParams(
            structured_outputs={"choice": ["yes"]}, allowed_token_ids=(300,), max_tokens=3
        )
        with pytest.raises(RequestError, match="nothing may be drawn"):
            llm.generate("Once", nothing, use_tqdm=False)
        llm._engine.check_integrity()


def test_the_guides_example_runs(capsys):
    page = Path(__file__).parents[1] / "docs" / "structured-output.md"
    example = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[1]
    exec(example, {"__name__": "example"})
    assert re.search(r"[A-Z][a-z]{2,8}, [0-9]{1,2} years\n", capsys.readouterr().out)
