"""C26: embeddings, from an encoder of random weights that is made here."""

import base64
import json

import numpy as np
import openai
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = ["the", "king", "had", "a", "daughter", "and", "wolf"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import torch
    import transformers

    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).eval().save_pretrained(path)
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    core.save(str(path / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@pytest.fixture(scope="module")
def server(start_server, encoder):
    server = start_server("--served-model-name", "bert", model=str(encoder)).wait_ready()
    yield server
    assert server.close() == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_c26_openai_embeddings_as_floats_and_as_base64(client, server):
    texts = ["the king had a daughter", "the wolf"]
    answer = client.embeddings.create(model="bert", input=texts)  # base64 on the wire
    assert [one.index for one in answer.data] == [0, 1]
    assert len(answer.data[0].embedding) == 32
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7 + 4
    floats = client.embeddings.create(model="bert", input=texts, encoding_format="float")
    for one, other in zip(answer.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    raw = server.http.post(
        "/v1/embeddings", json={"model": "bert", "input": texts, "encoding_format": "base64"}
    ).json()
    decoded = np.frombuffer(base64.b64decode(raw["data"][1]["embedding"]), dtype="<f4")
    assert decoded == pytest.approx(np.array(floats.data[1].embedding), abs=1e-6)


def test_c26_openai_token_ids_and_their_errors(client):
    ids = client.post("/../tokenize", cast_to=dict, body={"prompt": "the wolf"})["tokens"]
    from_text = client.embeddings.create(model="bert", input="the wolf").data[0].embedding
    from_ids = client.embeddings.create(model="bert", input=[ids]).data[0].embedding
    assert from_ids == pytest.approx(from_text, abs=1e-5)
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model="bert", input=[])
    assert raised.value.param == "input"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="bert", messages=[{"role": "user", "content": "x"}])


def test_c26_langchain_documents_and_queries(server):
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model="bert", base_url=server.url + "/v1", api_key="none", check_embedding_ctx_length=False
    )
    documents = embeddings.embed_documents(["the king", "the wolf"])
    assert len(documents) == 2
    assert embeddings.embed_query("the wolf") == pytest.approx(documents[1], abs=1e-6)


def test_c26_litellm_embeddings(server):
    import litellm

    answer = litellm.embedding(
        model="openai/bert", api_base=server.url + "/v1", api_key="none", input=["the wolf"]
    )
    assert len(answer.data[0]["embedding"]) == 32
