"""LLM.embed, score, classify and encode give what transformers gives, and say no by name."""

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from tokenry.errors import ConfigError, ModelLoadError, RequestError
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.pooling import PoolingParams
from tokenry.text.pooling import floats

LONG = tuple(range(7, 37))
BACKENDS = ["cpu", "sim-cuda", "sim-hpu", "sim-neuron", "sim-whole", "sim-opaque"]


def close(got: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(got), want, atol=1e-5, rtol=1e-5)


@pytest.fixture
def texts(words: Any) -> list[str]:
    return [words(1, 2, 3), words(*LONG), words(5), words(2, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_encoder_embeds_alike_on_every_backend(
    bert: Any, open_llm: Any, ask: Any, texts: list[str], backend: str
) -> None:
    path, model = bert
    llm = open_llm(path, backend=backend, backend_option=(), max_num_seqs=4, max_programs=8)
    found = llm.embed(texts, use_tqdm=False)
    assert len(found) == len(texts)
    for one in found:
        assert one.prompt_token_ids[0] == 1 and one.prompt_token_ids[-1] == 2
        want = functional.normalize(ask(model, one.prompt_token_ids).mean(0), dim=0)
        close(one.outputs.embedding, want)
    assert llm.ready.num_blocks == 0 and llm.get_metrics().kv_usage == 0


def test_neighbours_change_no_bit_of_an_embedding(bert: Any, open_llm: Any, words: Any) -> None:
    llm = open_llm(bert[0])
    texts = [words(*range(i, i + 1 + i % 30)) for i in range(60)]
    together = llm.embed(texts, use_tqdm=False)
    for i in (0, 7, 29, 59):
        alone = llm.embed(texts[i], use_tqdm=False)[0]
        assert alone.outputs.embedding == together[i].outputs.embedding


def test_the_layer_after_the_pooling_is_applied(
    make_model: Any, modules: Any, open_llm: Any, ask: Any, texts: list[str]
) -> None:
    path, model = make_model("DistilBertConfig")
    modules(path, "cls", dense=6, normalize=False)
    from safetensors.torch import load_file

    dense = load_file(path / "2_Dense" / "model.safetensors")
    found = open_llm(path).embed(texts, use_tqdm=False)
    assert len(found) == len(texts)
    for one in found:
        row = ask(model, one.prompt_token_ids)[0]
        want = torch.tanh(functional.linear(row, dense["linear.weight"], dense["linear.bias"]))
        close(one.outputs.embedding, want)


@pytest.mark.parametrize("backend", ["cpu", "sim-cuda", "sim-hpu", "sim-neuron"])
def test_a_decoder_embeds_by_its_last_token(
    qwen: Any, open_llm: Any, ask: Any, texts: list[str], backend: str
) -> None:
    path, model = qwen
    llm = open_llm(path, backend=backend, backend_option=(), max_num_batched_tokens=24,
                   max_num_seqs=4, max_programs=8)  # fmt: skip
    found = llm.embed(texts, use_tqdm=False)  # the long one takes two steps
    assert len(found) == len(texts)
    for one in found:
        want = functional.normalize(ask(model, one.prompt_token_ids)[-1], dim=0)
        close(one.outputs.embedding, want)


@pytest.mark.parametrize(
    ("backend", "method"), [("cpu", "mean"), ("cpu", "cls"), ("cpu", "last"), ("sim-hpu", "mean")]
)
def test_a_decoder_pools_over_chunks_as_the_flag_says(
    make_model: Any, open_llm: Any, ask: Any, words: Any, backend: str, method: str
) -> None:
    path, model = make_model("MistralConfig", "AutoModel", sliding_window=None)
    llm = open_llm(path, task="embed", pooling=method, max_num_batched_tokens=16, max_num_seqs=4,
                   backend=backend, backend_option=(), max_programs=8)  # fmt: skip
    text = words(*LONG)
    for cached in (False, method == "last"):  # the second time from the prefix cache, if it may
        one, short = llm.embed([text, words(3)], use_tqdm=False)
        assert (one.num_cached_tokens > 0) == cached
        for got in (one, short):
            rows = ask(model, got.prompt_token_ids)
            want = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}[method]
            close(got.outputs.embedding, functional.normalize(want, dim=0))


def test_a_preempted_text_is_pooled_anew(
    make_model: Any, open_llm: Any, ask: Any, words: Any
) -> None:
    path, model = make_model("LlamaConfig", "AutoModelForCausalLM")
    llm = open_llm(path, task="generate+embed", pooling="mean", max_num_batched_tokens=16,
                   num_kv_blocks=6, block_size=16, max_model_len=64, max_num_seqs=4)  # fmt: skip
    long = llm.get_tokenizer().encode(words(*LONG, *LONG[:20]))
    engine = llm._engine
    for i in range(2):
        greedy = SamplingParams(max_tokens=10, temperature=0)
        engine.add(AddRequest(request_id=f"g{i}", token_ids=tuple(long[:20]), params=greedy))
    nothing = SamplingParams(max_tokens=0)
    for i in range(2):
        engine.add(AddRequest(request_id=f"e{i}", token_ids=tuple(long[i:]), params=nothing,
                              pooling=PoolingParams()))  # fmt: skip
    ends = {}
    while engine.has_work():
        ends |= {e.request_id: e for e in engine.step() if e.finish_reason is not None}
        engine.check_integrity()
    for i in range(2):
        want = functional.normalize(ask(model, long[i:]).mean(0), dim=0)
        close(floats(ends[f"e{i}"].pooled), want)
        assert ends[f"e{i}"].finish_reason == "stop" and ends[f"g{i}"].finish_reason == "length"


@pytest.mark.parametrize("backend", ["cpu", "sim-hpu", "sim-cuda"])
def test_generation_and_embedding_share_steps(
    make_model: Any, open_llm: Any, ask: Any, words: Any, backend: str
) -> None:
    path, model = make_model("Qwen3Config", "AutoModelForCausalLM")
    llm = open_llm(
        path,
        task="generate+embed",
        backend=backend,
        backend_option=(),
        max_num_seqs=4,
        max_programs=8,
    )
    ids = tuple(llm.get_tokenizer().encode(words(*LONG)))
    greedy = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, logprobs=1)
    alone = llm.generate({"prompt_token_ids": list(ids)}, greedy, use_tqdm=False)[0].outputs[0]
    llm.reset_prefix_cache()
    engine, before = llm._engine, llm.get_metrics().steps
    engine.add(AddRequest(request_id="g", token_ids=ids, params=greedy))
    nothing = SamplingParams(max_tokens=0)
    engine.add(AddRequest(request_id="e", token_ids=ids[3:], params=nothing,
                          pooling=PoolingParams()))  # fmt: skip
    tokens: list[int] = []
    pooled = b""
    while engine.has_work():
        for event in engine.step():
            tokens += event.token_ids
            pooled = event.pooled or pooled
    close(floats(pooled), functional.normalize(ask(model, ids[3:])[-1], dim=0))
    assert tuple(tokens) == alone.token_ids
    assert llm.get_metrics().steps - before == 5  # the embedding took none of its own


@pytest.mark.parametrize("backend", ["cpu", "sim-neuron"])
def test_a_cross_encoder_scores_pairs(
    cross: Any, open_llm: Any, words: Any, texts: list[str], backend: str
) -> None:
    path, model = cross
    llm = open_llm(path, backend=backend, backend_option=(), max_num_seqs=4, max_programs=8)
    for final, last in ((None, torch.sigmoid), (False, lambda x: x)):
        params = PoolingParams(final=final)
        found = llm.score(words(9, 8), texts, pooling_params=params, use_tqdm=False)
        assert len(found) == len(texts)
        for one in found:
            second = one.prompt_token_ids.index(2) + 1
            types = [0] * second + [1] * (len(one.prompt_token_ids) - second)
            with torch.no_grad():
                logits = model(torch.tensor([list(one.prompt_token_ids)]),
                               token_type_ids=torch.tensor([types])).logits[0]  # fmt: skip
            close([one.outputs.score], last(logits))


def test_a_decoder_scores_pairs_too(make_model: Any, open_llm: Any, words: Any) -> None:
    kind = "AutoModelForSequenceClassification"
    path, model = make_model("Qwen3Config", kind, num_labels=1)
    one = open_llm(path).score(words(9, 8), words(*LONG), use_tqdm=False)[0]
    with torch.no_grad():
        logits = model(torch.tensor([list(one.prompt_token_ids)])).logits[0]
    close([one.outputs.score], torch.sigmoid(logits))


def test_a_classifier_gives_probabilities(classes: Any, open_llm: Any, texts: list[str]) -> None:
    path, model = classes
    llm = open_llm(path)
    found = llm.classify(texts, use_tqdm=False)
    assert len(found) == len(texts)
    for one in found:
        with torch.no_grad():
            logits = model(torch.tensor([list(one.prompt_token_ids)])).logits[0]
        close(one.outputs.probs, torch.softmax(logits, 0))
        assert one.outputs.label == model.config.id2label[int(logits.argmax())]
    raw = llm.encode(texts[0], pooling_params=PoolingParams(final=False), use_tqdm=False)[0]
    assert not math.isclose(sum(raw.outputs.data), 1)
    with pytest.raises(RequestError, match="has 3 classes; a score needs a model with one"):
        llm.score("w1", "w2")
    with pytest.raises(RequestError, match="does not give embeddings"):
        llm.embed("w1")


def test_an_embedding_model_scores_by_cosine(bert: Any, open_llm: Any, texts: list[str]) -> None:
    llm = open_llm(bert[0])
    vectors = [torch.tensor(v.outputs.embedding) for v in llm.embed(texts, use_tqdm=False)]
    for one, vector in zip(llm.score(texts[0], texts, use_tqdm=False), vectors, strict=True):
        assert one.outputs.score == pytest.approx(float(vectors[0] @ vector), abs=1e-6)
    both = llm.score(texts[:2], texts[2:], use_tqdm=False)
    assert both[1].outputs.score == pytest.approx(float(vectors[1] @ vectors[3]), abs=1e-6)
    with pytest.raises(RequestError, match="2 texts cannot be paired with 4"):
        llm.score(texts[:2], texts)


def test_embeddings_are_cut_where_the_model_was_trained_for_it(
    make_model: Any, open_llm: Any, ask: Any
) -> None:
    path, model = make_model("BertConfig", matryoshka_dimensions=[8, 16, 32])
    llm = open_llm(path, pooling="cls")
    for size in (8, 16, 32):
        one = llm.embed("w1 w2", pooling_params=PoolingParams(dimensions=size), use_tqdm=False)[0]
        want = ask(model, one.prompt_token_ids)[0][:size]
        close(one.outputs.embedding, functional.normalize(want, dim=0))
    raw = llm.embed("w1", pooling_params=PoolingParams(final=False, dimensions=8), use_tqdm=False)
    close(raw[0].outputs.embedding, ask(model, raw[0].prompt_token_ids)[0][:8])
    for size, text in ((7, "can have 8, 16, 32"), (0, "at least 1")):
        with pytest.raises(RequestError, match=text) as error:
            llm.embed("w1", pooling_params=PoolingParams(dimensions=size), use_tqdm=False)
        assert error.value.param == "dimensions"


def test_dimensions_need_a_matryoshka_model_or_the_flag(bert: Any, open_llm: Any) -> None:
    params = PoolingParams(dimensions=5)
    with pytest.raises(RequestError, match="not trained to be cut") as error:
        open_llm(bert[0]).embed("w1", pooling_params=params, use_tqdm=False)
    assert error.value.mend is not None and "--matryoshka" in error.value.mend
    cut = open_llm(bert[0], matryoshka=True).embed("w1", pooling_params=params, use_tqdm=False)
    assert len(cut[0].outputs.embedding) == 5
    assert sum(x * x for x in cut[0].outputs.embedding) == pytest.approx(1, abs=1e-5)


def test_a_long_text_is_refused_or_cut_as_asked(bert: Any, open_llm: Any, words: Any) -> None:
    llm = open_llm(bert[0])
    text = words(*range(60))
    with pytest.raises(RequestError, match=r"length is 40 tokens.*has 62") as error:
        llm.embed(["w1", text], use_tqdm=False)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompts[1]"
    for most, count in ((-1, 40), (10, 10)):
        one = llm.embed(text, truncate_prompt_tokens=most, use_tqdm=False)[0]
        short = llm.embed(words(*range(count - 2)), use_tqdm=False)[0]
        assert one.prompt_token_ids == short.prompt_token_ids  # [CLS] and [SEP] stay
        assert one.outputs.embedding == short.outputs.embedding
    with pytest.raises(RequestError, match=r"-1 or lie in 1\.\.40") as error:
        llm.embed(text, truncate_prompt_tokens=41)
    assert error.value.param == "truncate_prompt_tokens"


def test_a_text_far_too_long_is_not_read_to_its_end_and_cut_alike(
    bert: Any, cross: Any, open_llm: Any, words: Any
) -> None:
    llm = open_llm(bert[0])
    long, short = words(*range(100)) * 30_000, words(*range(100)) + " "
    with pytest.raises(RequestError, match=r"is 40 tokens.* has more than \d+ tokens"):
        llm.embed(long, use_tqdm=False)
    cut, whole = llm.embed([long, short * 2], truncate_prompt_tokens=-1, use_tqdm=False)
    assert cut.prompt_token_ids == whole.prompt_token_ids
    pairs = open_llm(cross[0])
    for first in (words(3), short):
        far, near = (
            pairs.score(first, text, truncate_prompt_tokens=-1, use_tqdm=False)[0]
            for text in (long, short * 2)
        )
        assert far.prompt_token_ids == near.prompt_token_ids


def test_a_pair_is_cut_as_transformers_cuts_it(cross: Any, open_llm: Any, words: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(tokenizer_file=str(cross[0] / "tokenizer.json"))
    llm = open_llm(cross[0])
    lengths = [(1, 1), (5, 90), (90, 5), (60, 60), (61, 60), (60, 61), (46, 130), (47, 46)]
    for n, m in lengths:
        a, b = words(*range(n)), words(*range(m))
        one = llm.score(a, b, truncate_prompt_tokens=-1, use_tqdm=False)[0]
        want = oracle(a, b, truncation="longest_first", max_length=96)["input_ids"]
        assert one.prompt_token_ids == tuple(want), (n, m)


def test_newer_files_of_sentence_transformers_are_read(
    make_model: Any, modules: Any, open_llm: Any, ask: Any
) -> None:
    path, model = make_model("BertConfig")
    modules(path, "mean", normalize=False)
    (path / "sentence_bert_config.json").write_text(json.dumps({"modality_config": {}}))
    named = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(named))
    own = {"prompts": {"query": "ask: ", "document": ""}}
    (path / "config_sentence_transformers.json").write_text(json.dumps(own))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 33}))
    llm = open_llm(path)
    assert llm.ready.max_model_len == 33
    assert any("prompts before its texts (query" in note for note in llm.ready.notes)
    one = llm.embed("w1 w2", use_tqdm=False)[0]
    close(one.outputs.embedding, ask(model, one.prompt_token_ids)[-1])


@pytest.mark.parametrize("where", ["config.json", "config_sentence_transformers.json"])
def test_a_cross_encoder_may_name_its_activation(
    make_model: Any, open_llm: Any, where: str
) -> None:
    kind = "AutoModelForSequenceClassification"
    path, _ = make_model("BertConfig", kind, num_labels=1)
    raw = open_llm(path).score("w1", "w2", pooling_params=PoolingParams(final=False),
                               use_tqdm=False)[0].outputs.score  # fmt: skip
    said = {"activation_fn": "torch.nn.modules.linear.Identity"}
    file = path / where
    old = json.loads(file.read_text()) if file.exists() else {}
    new = {"sentence_transformers": said} if where == "config.json" else said
    file.write_text(json.dumps({**old, **new}))
    assert open_llm(path).score("w1", "w2", use_tqdm=False)[0].outputs.score == raw


def test_tokens_and_vectors_are_asked_of_models_that_have_them(
    bert: Any, qwen: Any, make_model: Any, open_llm: Any
) -> None:
    for path in (bert[0], qwen[0]):
        with pytest.raises(RequestError, match="gives embeddings; it does not generate text"):
            open_llm(path).generate("w1", use_tqdm=False)
    causal, _ = make_model("LlamaConfig", "AutoModelForCausalLM")
    llm = open_llm(causal)
    with pytest.raises(RequestError, match="generates text") as error:
        llm.embed("w1")
    assert error.value.mend is not None and "--task embed" in error.value.mend
    assert llm.generate("w1", SamplingParams(max_tokens=2), use_tqdm=False)
    assert open_llm(qwen[0], task="generate").generate("w1", use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"task": "generate"}, "--task generate: a BertModel serves embed, score"),
        ({"task": "classify"}, "--task classify: a BertModel serves embed"),
        ({"num_kv_blocks": 9}, "--num-kv-blocks 9: a bidirectional encoder has no KV cache"),
        ({"block_size": 16}, "--block-size 16"),
    ],
    ids=["generate", "classify", "kv", "block"],
)
def test_options_that_an_encoder_has_no_use_for_are_refused(
    bert: Any, open_llm: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        open_llm(bert[0], **options)


def test_files_that_ask_for_more_than_we_compute_are_refused(
    make_model: Any, modules: Any, open_llm: Any
) -> None:
    path, _ = make_model("BertConfig")
    modules(path, "mean")
    file = path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelLoadError, match="pools by pooling_mode_max_tokens"):
        open_llm(path)
    assert open_llm(path, pooling="cls").embed("w1", use_tqdm=False)
    file.write_text(json.dumps({"pooling_mode_mean_tokens": True, "include_prompt": False}))
    with pytest.raises(ModelLoadError, match="include_prompt"):
        open_llm(path)
    listed = json.loads((path / "modules.json").read_text())
    listed[1]["type"] = "sentence_transformers.models.LSTM"
    (path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelLoadError, match="module LSTM"):
        open_llm(path)


def test_a_plan_of_an_encoder_is_refused(bert: Any, capsys: Any) -> None:
    from tokenry.cli import main

    assert main(["plan", str(bert[0]), "--device", "h200"]) == 2
    assert "bidirectional encoder: it has no KV cache" in capsys.readouterr().err
