"""SamplingParams refuse at birth what could not be served later, and name the field."""

from __future__ import annotations

import pytest

from tokenry.errors import RequestError
from tokenry.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"seed": 1.5}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"n": 2.0}, "n"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"min_tokens": 0.5}, "min_tokens"),
        ({"top_k": 3.0}, "top_k"),
        ({"logprobs": 1.5}, "logprobs"),
        ({"prompt_logprobs": 0.0}, "prompt_logprobs"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"stop": [5]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"allowed_token_ids": ["5"]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [3]}, "bad_words"),
        ({"bad_words_ids": [[1.5]]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"logit_bias": {5: "much"}}, "logit_bias.5"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"detokenize": 1}, "detokenize"),
        ({"logits_processor": 5}, "logits_processor"),
        ({"extra_args": [1]}, "extra_args"),
    ],
    ids=str,
)
def test_value_of_a_wrong_type_or_range_is_refused_and_named(values, param):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert caught.value.param == param


def test_lists_are_taken_as_tuples_and_one_string_as_a_list_of_one():
    params = SamplingParams(
        stop="end",
        bad_words="king",
        stop_token_ids=[5],
        bad_words_ids=[[3, 4]],
        allowed_token_ids=[5, 6],
    )
    assert (params.stop, params.bad_words) == (("end",), ("king",))
    assert params.stop_token_ids == (5,)
    assert params.bad_words_ids == ((3, 4),)
    assert params.allowed_token_ids == (5, 6)
