"""OpenAI's own client against a server that really runs."""

import re

import openai
import pytest


@pytest.fixture(scope="module")
def client(toy):
    with openai.OpenAI(base_url=toy.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES = [{"role": "user", "content": "Tell me a story."}]


def test_models_list_and_get(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/name")


def test_chat(client):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=8, seed=1
    )
    assert re.match("chatcmpl-", answer.id)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.system_fingerprint
    assert answer._request_id


def test_streamed_chat_equals_the_whole_one(client):
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": 20, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts, roles, ends = ["", "", ""], [], []
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        ends += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert roles == [0, 1, 2]
    assert sorted(ends) == [0, 1, 2]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 60
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 4
    for position in content:
        assert position.logprob == position.top_logprobs[0].logprob
        assert bytes(position.bytes).decode(errors="replace") == position.token
        assert len(position.top_logprobs) == 2


def test_prompts_of_every_form_and_choice_order(client):
    asked = {"model": "demo", "max_tokens": 5, "temperature": 0}
    ids = client.post("/../tokenize", cast_to=dict, body={"prompt": "Once"})["tokens"]
    single = client.completions.create(prompt="Once", **asked).choices[0].text
    assert client.completions.create(prompt=ids, **asked).choices[0].text == single
    many = client.completions.create(prompt=["Once", "The"], n=2, **asked)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == single
    assert many.usage.completion_tokens == 20
    lists = client.completions.create(prompt=[ids, ids], **asked)
    assert [choice.text for choice in lists.choices] == [single, single]


def test_echo_with_logprobs_scores_the_prompt_as_evaluations_need(client):
    answer = client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    table = choice.logprobs
    assert choice.text == "Once upon a time"
    assert table.token_logprobs[0] is None
    assert "".join(table.tokens).endswith("Once upon a time")
    assert len(table.tokens) == answer.usage.prompt_tokens
    for logprob, top in zip(table.token_logprobs[1:], table.top_logprobs[1:], strict=True):
        assert logprob <= max(top.values())


def test_stop_string_is_not_in_the_text_streamed_or_not(client):
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 30, "seed": 3}
    text = client.completions.create(**asked).choices[0].text
    stop = text[8:11]
    whole = client.completions.create(**asked, stop=stop).choices[0]
    assert whole.finish_reason == "stop"
    assert whole.text == text[: text.index(stop)]
    chunks = list(client.completions.create(**asked, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text


def test_tokenize_and_back(toy):
    done = toy.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert done["count"] == len(done["tokens"])
    text = toy.http.post("/detokenize", json={"tokens": done["tokens"]}).json()["prompt"]
    assert "Tell me a story." in text
    assert toy.http.get("/tokenizer_info").json()["model_max_length"] == 512


def test_errors_become_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
