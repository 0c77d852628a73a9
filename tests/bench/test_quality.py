"""`tokenry quantize --report`: perplexities of a text, format by format."""

import json
import math
import re

import pytest

from tokenry import LLM, SamplingParams
from tokenry.cli import main

TEXT = "Once upon a time there was a king who had three sons, and the youngest was called Hans. "


def test_the_report_has_a_row_for_each_format(tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT * 3)
    figures = tmp_path / "figures.json"
    flags = ["--text", str(tmp_path / "text"), "--window", "30", "--max-tokens", "45"]
    flags += ["--json", str(figures), "--backend", "cpu", "--formats", "none", "int4"]
    assert main(["quantize", "demo", "--report", *flags]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["weights", "none", "int4"]
    assert rows[1][1] == "43"  # 45 tokens in two windows, each without its first
    assert rows[1][3:] == ["+0.00%", "100.00%"]
    written = json.loads(figures.read_text())
    assert float(rows[2][2]) == pytest.approx(written["int4"]["perplexity"], abs=1e-4)
    assert written["none"]["perplexity"] == pytest.approx(by_hand(TEXT * 3), rel=1e-5)


def by_hand(text):
    with LLM("demo", backend="cpu", max_model_len=64) as llm:
        ids = llm.get_tokenizer().encode(text)[:45]
        total = 0.0
        for part in (ids[:30], ids[30:]):
            (output,) = llm.generate(
                [{"prompt_token_ids": part}], SamplingParams(max_tokens=1, prompt_logprobs=0)
            )
            total -= sum(
                entry[token].logprob
                for token, entry in zip(part[1:], output.prompt_logprobs[1:], strict=True)
            )
    return math.exp(total / 43)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no quantised model is written"),
        (["--report"], "--text FILE"),
        (["--report", "--text", "/nowhere/text"], "--text /nowhere/text: .*No such file"),
        (["--report", "--text", __file__, "--window", "1"], "--window is 1"),
    ],
    ids=["no report", "no text", "no file", "window"],
)
def test_what_cannot_be_reported_is_refused(capsys, flags, words):
    assert main(["quantize", "demo", *flags]) == 2
    assert re.search(words, capsys.readouterr().err)
