"""Marked answers of the demo model are told from unmarked ones, by the key alone."""

import math

import pytest

from tokenry import LLM, SamplingParams
from tokenry.cli import main
from tokenry.errors import ConfigError, RequestError
from tokenry.params import Watermark
from tokenry.watermark import binomial_tail, detect, gamma_tail

PROMPTS = ["Once upon a time", "The little dog", "Lily and Tom", "One day"]
MARKS = {
    "kgw": Watermark(scheme="kgw", key=77, delta=3.0),
    "kgw-wide": Watermark(scheme="kgw", key=77, delta=3.0, context=2, gamma=0.5),
    "gumbel": Watermark(scheme="gumbel", key=77, context=2),
}


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", backend="cpu", max_model_len=512, progress=False, num_kv_blocks=200) as llm:
        yield llm


def answers(llm, **values):
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=200, ignore_eos=True, **values)
        for i in range(len(PROMPTS))
    ]
    return [one.outputs[0] for one in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(llm):
    return answers(llm)


@pytest.mark.parametrize("name", MARKS)
def test_marked_texts_are_told_from_unmarked_ones(llm, plain, name):
    mark = MARKS[name]
    marked = answers(llm, watermark=mark)
    other = Watermark(scheme=mark.scheme, key=78, gamma=mark.gamma, context=mark.context)
    tokenizer = llm.get_tokenizer()
    for with_mark, without in zip(marked, plain, strict=True):
        ids = tokenizer.encode(with_mark.text, add_special_tokens=False)
        assert detect(ids, mark).p_value < 1e-4
        assert detect(with_mark.token_ids, mark).p_value < 1e-4
        assert detect(ids, other).p_value > 1e-3
        assert detect(without.token_ids, mark).p_value > 1e-3


def test_a_gumbel_mark_still_draws_different_answers_for_different_contexts(llm):
    texts = {one.text for one in answers(llm, watermark=MARKS["gumbel"])}
    assert len(texts) == len(PROMPTS)


def test_the_command_prints_score_and_p_value(llm, tmp_path, capsys, plain):
    marked, unmarked = tmp_path / "marked.txt", tmp_path / "unmarked.txt"
    marked.write_text(answers(llm, watermark=MARKS["kgw"])[0].text)
    unmarked.write_text(plain[0].text)
    files = [str(marked), str(unmarked)]
    command = ["watermark", "detect", "--model", "demo", "--scheme", "kgw", "--key", "77", *files]
    assert main(command) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert ": marked (z = " in first
    assert "no mark found (z = " in second
    assert ", p = " in second
    assert main([*command[:-2], str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_gumbel_mark_needs_a_draw():
    with pytest.raises(RequestError, match="temperature above 0") as caught:
        SamplingParams(temperature=0, watermark=MARKS["gumbel"])
    assert caught.value.param == "watermark"


def test_a_mark_may_be_a_dict_and_a_wrong_one_is_named():
    given = {"scheme": "kgw", "key": 77}
    assert SamplingParams(watermark=given).watermark == Watermark(**given)
    for wrong in ({"scheme": "kgw", "gama": 0.5}, {"key": 3}, "kgw"):
        with pytest.raises(RequestError) as caught:
            SamplingParams(watermark=wrong)
        assert caught.value.param == "watermark"


def test_too_short_a_text_is_named():
    with pytest.raises(ConfigError, match="more than 2"):
        detect([5, 6], MARKS["gumbel"])


def test_tails_are_those_of_the_distributions():
    exact = sum(math.comb(20, k) * 0.25**k * 0.75 ** (20 - k) for k in range(9, 21))
    assert binomial_tail(20, 0.25, 9) == pytest.approx(exact)
    assert binomial_tail(20, 0.25, 0) == 1.0
    assert gamma_tail(1, 3.0) == pytest.approx(math.exp(-3))
    assert gamma_tail(3, 2.0) == pytest.approx(math.exp(-2) * (1 + 2 + 2))
    assert gamma_tail(500, 500.0) == pytest.approx(0.5, abs=0.02)
