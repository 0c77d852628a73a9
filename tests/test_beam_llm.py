"""Beam search of the demo model is transformers' beam search; sampling extras survive crowding."""

import msgspec
import pytest
import torch

from tokenry import LLM, BeamSearchParams, SamplingParams, Watermark
from tokenry.errors import RequestError
from tokenry.hub import find_model

PROMPTS = ["Once upon a time, there was a little dog", "Lily and Tom went to the park", "One day"]
COMMA, STOP = 16, 18
CROWDED = {"num_kv_blocks": 12, "max_num_seqs": 4, "max_num_batched_tokens": 32}


def make(**values):
    given = {"max_model_len": 128, "num_kv_blocks": 80, "dtype": "float32", "backend": "cpu"}
    return LLM("demo", progress=False, **{**given, **values})


@pytest.fixture(scope="module")
def llm():
    with make() as llm:
        yield llm


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(find_model("demo"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("width", "length_penalty", "early", "stops"),
    [
        (4, 1.0, False, ()),
        (4, 0.0, False, ()),
        (3, 1.0, True, (STOP,)),
        (4, 1.0, False, (COMMA, STOP)),
        (3, 2.0, "never", (COMMA,)),
        (2, -1.0, False, (STOP,)),
        (1, 1.0, False, (STOP,)),
    ],
)
def test_the_answers_are_those_of_transformers(llm, theirs, width, length_penalty, early, stops):
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=20,
        length_penalty=length_penalty,
        early_stopping=early,
        stop_token_ids=stops,
    )
    for prompt, output in zip(PROMPTS, llm.beam_search(PROMPTS, params), strict=True):
        ids = llm.get_tokenizer().encode(prompt)
        want = theirs.generate(
            torch.tensor([ids]),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            max_new_tokens=20,
            length_penalty=length_penalty,
            early_stopping=early,
            eos_token_id=[4, *stops],
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(output.sequences) == width
        for i, one in enumerate(output.sequences):
            row = want.sequences[i].tolist()
            assert one.tokens == row[: len(one.tokens)]
            assert set(row[len(one.tokens) :]) <= {0, 4}  # padded with the first end token
            assert (one.finish_reason == "stop") == (one.tokens[-1] in (4, *stops))
            if width > 1:
                length = len(one.tokens) - len(ids)
                score = one.cum_logprob / length**length_penalty
                assert score == pytest.approx(float(want.sequences_scores[i]), abs=1e-3)
            assert len(one.logprobs) == len(one.tokens) - len(ids)
            assert sum(
                e[t].logprob for e, t in zip(one.logprobs, one.tokens[len(ids) :], strict=True)
            ) == (pytest.approx(one.cum_logprob))


def test_a_crowded_search_gives_the_same_answers(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=30)
    want = [[s.tokens for s in o.sequences] for o in llm.beam_search(PROMPTS, params)]
    with make(**CROWDED) as small:
        got = [[s.tokens for s in o.sequences] for o in small.beam_search(PROMPTS, params)]
        small._engine.check_integrity()
    assert got == want


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"stop": ("x",)}, "stop"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"mirostat": 2}, "mirostat"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"beam_width": 65}, "beam_width"),
        ({"early_stopping": "perhaps"}, "early_stopping"),
    ],
    ids=str,
)
def test_what_a_search_cannot_honour_is_named(change, param):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"beam_width": 4, "n": 2, **change})
    assert caught.value.param == param


EXTRAS = [
    SamplingParams(mirostat=2, mirostat_tau=3.0, seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(dry_multiplier=0.8, seed=2, max_tokens=40, ignore_eos=True),
    SamplingParams(typical_p=0.7, xtc_probability=0.5, seed=3, max_tokens=40, ignore_eos=True),
    SamplingParams(no_repeat_ngram_size=2, temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(top_n_sigma=1.0, mirostat=2, seed=4, max_tokens=40, ignore_eos=True),
    SamplingParams(
        watermark=Watermark(scheme="gumbel", key=5, context=2),
        max_tokens=40,
        ignore_eos=True,
        seed=5,
    ),
]


def test_extras_draw_the_same_alone_in_a_batch_overlapped_and_after_a_preemption(llm):
    prompts = [PROMPTS[i % 3] for i in range(len(EXTRAS))]
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, EXTRAS, use_tqdm=False)]
    alone = [
        llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, params in zip(prompts, EXTRAS, strict=True)
    ]
    assert together == alone
    assert len({*together}) == len(EXTRAS)
    for values in ({"overlap": True}, {**CROWDED, "overlap": True}):
        with make(**values) as other:
            got = [o.outputs[0].token_ids for o in other.generate(prompts, EXTRAS, use_tqdm=False)]
            preemptions = other.get_metrics().num_preemptions
        assert got == together
    assert preemptions > 0


@pytest.mark.parametrize("backend", ["sim-opaque", "sim-hpu", "sim-neuron"])
def test_devices_with_other_rules_search_and_draw_the_same(llm, backend):
    params = BeamSearchParams(beam_width=3, max_tokens=10)
    few = [msgspec.structs.replace(one, max_tokens=10) for one in EXTRAS]
    prompts = [PROMPTS[i % 3] for i in range(len(few))]

    def both(engine):
        beams = [[s.tokens for s in o.sequences] for o in engine.beam_search(PROMPTS, params)]
        drawn = [o.outputs[0].token_ids for o in engine.generate(prompts, few, use_tqdm=False)]
        return beams, drawn

    small = {"max_model_len": 64, "num_kv_blocks": 40, "max_num_seqs": 4}
    with make(backend=backend, max_num_batched_tokens=64, **small) as other:
        assert both(other) == both(llm)
        other._engine.check_integrity()


def test_no_repeated_bigram_and_less_repetition_are_seen_in_the_tokens(llm):
    plain, dry, unique = (
        llm.generate(
            PROMPTS[2],
            SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, **values),
            use_tqdm=False,
        )[0]
        for values in ({}, {"dry_multiplier": 5.0}, {"no_repeat_ngram_size": 3})
    )

    def repeated(output, size):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
        return len(grams) - len(set(grams))

    assert repeated(unique, 3) == 0
    assert repeated(plain, 4) > repeated(dry, 4)


def test_sequence_breakers_become_every_token_that_holds_one(llm):
    tokenizer = llm.get_tokenizer()
    from tokenry.text.breakers import Breakers

    ids = Breakers(tokenizer).ids((",", '"'))
    assert COMMA in ids
    assert all("," in tokenizer.token_text(i) or '"' in tokenizer.token_text(i) for i in ids)
    assert Breakers(tokenizer).ids(()) == ()
