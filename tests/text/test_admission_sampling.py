"""Fields that a device without logits cannot honour are refused by name; breakers become tokens."""

import pytest

from tokenry.errors import RequestError
from tokenry.hub import find_model
from tokenry.messages import RequestLimits
from tokenry.params import NEEDS_LOGITS, SamplingParams, Watermark
from tokenry.text.admission import Admission
from tokenry.text.tokenizer import Tokenizer

ASKED = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "min_p": 0.1,
    "min_tokens": 2,
    "bad_words": ("x",),
    "logit_bias": {3: 1.0},
    "allowed_token_ids": (3,),
    "logits_processor": "mine",
    "logprobs": 0,
    "prompt_logprobs": 0,
    "typical_p": 0.5,
    "top_n_sigma": 1.0,
    "xtc_probability": 0.5,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "no_repeat_ngram_size": 3,
    "watermark": Watermark(scheme="kgw"),
    "structured_outputs": {"regex": "a+"},
    "beam_width": 2,
}


def admission(**limits):
    tokenizer = Tokenizer.load(find_model("demo"))
    return Admission(tokenizer, max_model_len=64, vocab_size=4096, limits=RequestLimits(**limits))


def test_every_field_that_needs_logits_is_refused_where_there_are_none():
    assert set(ASKED) == set(NEEDS_LOGITS)
    admit = admission(unserved=NEEDS_LOGITS)
    for name, value in ASKED.items():
        with pytest.raises(RequestError, match="draws by itself") as caught:
            admit([5], SamplingParams(**{name: value}), priority=0, param="prompt")
        assert caught.value.param == name
    plain = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=3, stop=("x",))
    assert admit([5], plain, priority=0, param="prompt").top_p == 0.9


def test_a_beam_search_has_as_many_ends_and_beams_as_can_be_compared():
    admit = admission()
    many = SamplingParams(beam_width=2, stop_token_ids=range(17))
    with pytest.raises(RequestError, match="at most 16") as caught:
        admit([5], many, priority=0, param="prompt")
    assert caught.value.param == "stop_token_ids"
    admit([5], SamplingParams(stop_token_ids=range(17)), priority=0, param="prompt")
    small = Admission(
        Tokenizer.load(find_model("demo")), max_model_len=64, vocab_size=9, limits=RequestLimits()
    )
    with pytest.raises(RequestError, match="9 tokens") as caught:
        small([5], SamplingParams(beam_width=10), priority=0, param="prompt")
    assert caught.value.param == "beam_width"


def test_breakers_are_tokens_only_where_dry_asks_for_them():
    admit = admission()
    off = admit([5], SamplingParams(), priority=0, param="prompt")
    assert off.dry_breaker_ids == ()
    on = admit([5], SamplingParams(dry_multiplier=0.8), priority=0, param="prompt")
    assert len(on.dry_breaker_ids) > 3
    given = SamplingParams(dry_multiplier=0.8, dry_breaker_ids=(9, 11))
    assert admit([5], given, priority=0, param="prompt").dry_breaker_ids == (9, 11)
    wrong = SamplingParams(dry_multiplier=0.8, dry_breaker_ids=(9999,))
    with pytest.raises(RequestError, match="9999"):
        admit([5], wrong, priority=0, param="prompt")
