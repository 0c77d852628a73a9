"""Qwen3-Reranker's form: P(yes) of the last token, after the model's own prompt, as transformers
computes it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenry.errors import ConfigError, ModelLoadError, RequestError, UnknownArchitecture
from tokenry.pooling import PoolingParams


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own matrix"])
def judge(make_judge: Any, request: Any) -> Any:
    return make_judge(tied=request.param)


def test_a_pairs_score_is_p_yes_after_the_models_prompt(
    judge: Any, judging: Any, open_llm: Any
) -> None:
    llm = open_llm(judge[0], task="rerank")
    query, documents = "w1 w2", ["w3 w4 w5", "w6", "w8 " * 12]
    found = llm.score(query, documents, use_tqdm=False)
    raw = llm.score(query, documents, pooling_params=PoolingParams(final=False), use_tqdm=False)
    for document, one, odds in zip(documents, found, raw, strict=True):
        ids, answers = judging.of(judge, judging.prompt(query, document))
        assert list(one.prompt_token_ids) == ids
        want = torch.softmax(answers, 0)[1]
        torch.testing.assert_close(one.outputs.score, want.item(), atol=1e-5, rtol=1e-5)
        log_odds = (answers[1] - answers[0]).item()
        torch.testing.assert_close(odds.outputs.score, log_odds, atol=1e-5, rtol=1e-5)
    with pytest.raises(RequestError, match="does not generate text"):
        llm.generate("w1", use_tqdm=False)


def test_what_is_too_long_is_refused_or_cut_at_the_documents_end(
    judge: Any, judging: Any, open_llm: Any
) -> None:
    llm = open_llm(judge[0], task="rerank", max_model_len=80)
    long = "w7 " * 60
    with pytest.raises(RequestError, match="maximum context length is 80"):
        llm.score("w1", long, use_tqdm=False)
    cut = llm.score("w1", long, truncate_prompt_tokens=-1, use_tqdm=False)[0]
    whole, _ = judging.of(judge, judging.prompt("w1", long))
    tail = len(judging.of(judge, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")[0])
    assert len(cut.prompt_token_ids) == 80
    assert list(cut.prompt_token_ids) == [*whole[: 80 - tail], *whole[-tail:]]


def test_the_files_or_the_name_say_that_it_is_one(
    judge: Any, judging: Any, open_llm: Any, tmp_path: Path
) -> None:
    named = tmp_path / "models--Qwen--Qwen3-Reranker-0.6B" / "snapshots"
    named.parent.mkdir()
    named.symlink_to(judge[0])
    want = judging.of(judge, judging.prompt("w1", "w2"))[1].softmax(0)[1].item()
    for options in ({}, {"task": "score"}):
        one = open_llm(named, **options).score("w1", "w2", use_tqdm=False)[0]
        torch.testing.assert_close(one.outputs.score, want, atol=1e-5, rtol=1e-5)
    assert open_llm(named, task="generate").generate("w1", use_tqdm=False)
    assert open_llm(judge[0]).generate("w1", use_tqdm=False)
    beside = tmp_path / "qwen3-reranker-trials" / "base"
    beside.parent.mkdir()
    beside.symlink_to(judge[0])
    assert open_llm(beside).generate("w1", use_tqdm=False)


def test_models_that_were_not_made_for_it_are_refused(
    judge: Any, judging: Any, bert: Any, make_model: Any, open_llm: Any, tmp_path: Path
) -> None:
    llama, _ = make_model("LlamaConfig", "AutoModelForCausalLM")
    with pytest.raises(ConfigError, match="--task rerank: a LlamaForCausalLM is not asked"):
        open_llm(llama, task="rerank")
    with pytest.raises(ConfigError, match="--task rerank: a BertModel serves embed, score"):
        open_llm(bert[0], task="rerank")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["T5EncoderModel"]})
    )
    judging.write_tokenizer(tmp_path)
    with pytest.raises(UnknownArchitecture, match="T5EncoderModel has no native") as refused:
        open_llm(tmp_path)
    assert "Bert" in str(refused.value.mend) and "Qwen3ForCausalLM" in str(refused.value.mend)
    with pytest.raises(ConfigError, match="--pooling mean"):
        open_llm(judge[0], task="rerank", pooling="mean")
    other = tmp_path / "other"
    other.mkdir()
    for file in judge[0].iterdir():
        (other / file.name).symlink_to(file)
    (other / "1_LogitScore").mkdir()
    said = other / "1_LogitScore" / "config.json"
    said.write_text(json.dumps({"true_token_id": 5, "false_token_id": None}))
    with pytest.raises(ModelLoadError, match="LogitScore reads the tokens"):
        open_llm(other, task="rerank")
    said.unlink()
    (other / "tokenizer.json").unlink()
    judging.write_tokenizer(other, without="<think>")
    with pytest.raises(ModelLoadError, match="has no token '<think>'"):
        open_llm(other, task="rerank")
