"""C30, C31: OpenAI's responses, Anthropic's messages, Hugging Face's TGI."""

import time

import anthropic
import huggingface_hub
import openai
import pytest
from huggingface_hub.errors import ValidationError

STORY = "Tell me a story."
USER = [{"role": "user", "content": STORY}]


def test_c30_openai_events_of_a_response_come_in_order(openai_client):
    whole = openai_client.responses.create(
        model="demo", input=STORY, temperature=0, extra_body={"stop": [" he "]}
    )
    assert whole.status == "completed"
    with openai_client.responses.stream(
        model="demo", input=STORY, temperature=0, extra_body={"stop": [" he "]}
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    names = [event.type.removeprefix("response.") for event in events]
    deltas = names.count("output_text.delta")
    assert deltas > 0
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_c30_openai_a_conversation_goes_on_from_a_stored_response(openai_client):
    responses = openai_client.responses
    asked = {"model": "demo", "temperature": 0, "max_output_tokens": 6}
    first = responses.create(input=STORY, **asked)
    assert first.status == "incomplete"
    assert first.incomplete_details.reason == "max_output_tokens"
    second = responses.create(input="Go on.", previous_response_id=first.id, **asked)
    as_items = [
        {"role": "user", "content": STORY},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Go on."},
    ]
    assert responses.create(input=as_items, **asked).output_text == second.output_text
    assert responses.retrieve(second.id).output_text == second.output_text
    (item,) = responses.input_items.list(second.id).data
    assert item.content[0].text == "Go on."
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as raised:
        responses.create(input="x", previous_response_id=second.id, **asked)
    assert raised.value.param == "previous_response_id"
    kept = responses.create(input=STORY, store=False, **asked)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(kept.id)


def test_c30_openai_a_response_in_the_background_is_cancelled(openai_client, http):
    asked = {"model": "demo", "input": STORY, "background": True}
    long = openai_client.responses.create(**asked, extra_body={"logit_bias": None, "top_k": 1})
    assert long.status == "in_progress"
    ended = openai_client.responses.cancel(long.id)
    assert ended.status in ("cancelled", "completed", "incomplete")
    short = openai_client.responses.create(**asked, max_output_tokens=3)
    while short.status == "in_progress":
        time.sleep(0.05)
        short = openai_client.responses.retrieve(short.id)
    assert short.status == "incomplete"
    assert short.output_text
    assert http.get("/health/integrity").json() == {"ok": True}


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_c30_anthropic_a_message_and_its_stream(claude):
    asked = {
        "model": "demo",
        "max_tokens": 8,
        "system": "Be kind.",
        "messages": USER,
        "extra_body": {"temperature": 0},
    }
    whole = claude.messages.create(**asked)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 8
    with claude.messages.stream(**asked) as stream:
        names = [event.type for event in stream]
        final = stream.get_final_message()
    raw = [name for name in names if name != "text"]
    assert raw == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * raw.count("content_block_delta"),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == (
        whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    )
    stop = whole.content[0].text[4:8]
    stopped = claude.messages.create(**asked, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_c30_anthropic_counts_and_errors(claude):
    asked = {"model": "demo", "max_tokens": 3, "messages": USER}
    counted = claude.messages.count_tokens(model="demo", messages=USER).input_tokens
    usage = claude.messages.create(**asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**{**asked, "model": "nope"})
    assert missing.value.body["type"] == "error"
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as wrong:
        claude.messages.create(**{**asked, "messages": [{"role": "king", "content": "x"}]})
    assert "messages[0].role" in wrong.value.body["error"]["message"]


@pytest.fixture(scope="module")
def tgi(url):
    return huggingface_hub.InferenceClient(model=url, token="none")


def test_c31_hf_a_text_its_details_and_its_stream(tgi):
    text = tgi.text_generation("Once upon a time", max_new_tokens=8)
    told = tgi.text_generation(
        "Once upon a time", max_new_tokens=8, details=True, decoder_input_details=True
    )
    assert told.generated_text == text
    assert "".join(token.text for token in told.details.tokens) == text
    assert told.details.finish_reason == "length"
    assert [token.logprob is None for token in told.details.prefill][:2] == [True, False]
    assert "".join(tgi.text_generation("Once upon a time", max_new_tokens=8, stream=True)) == text
    events = list(
        tgi.text_generation("Once upon a time", max_new_tokens=8, stream=True, details=True)
    )
    assert [event.index for event in events] == list(range(1, 9))
    assert all(event.generated_text is None for event in events[:-1])
    assert events[-1].generated_text == text
    assert events[-1].details.generated_tokens == 8
    assert all(event.token.logprob < 0 for event in events)
    full = tgi.text_generation("Once upon a time", max_new_tokens=8, return_full_text=True)
    assert full == "Once upon a time" + text
    stop = text[3:8]
    stopped = tgi.text_generation("Once upon a time", max_new_tokens=8, details=True, stop=[stop])
    assert stopped.details.finish_reason == "stop_sequence"
    assert stopped.generated_text == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter_id", "a"),
        ("best_of", 3),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
        ("temperature", -1),
        ("top_k", 0),
        ("top_n_tokens", 9),
        ("top_p", 1.5),
        ("typical_p", 1.0),
        ("truncate", 0),
    ],
)
def test_c31_hf_a_wrong_parameter_is_named(tgi, field, value):
    with pytest.raises(ValidationError, match=f"parameters.{field}"):
        tgi.text_generation("Once", **{field: value})


def test_c31_http_errors_and_facts_have_tgis_shape(http):
    wrong = http.post("/generate", json={"inputs": "x", "parameters": {"top_p": 7}})
    assert wrong.status_code == 422
    assert set(wrong.json()) == {"error", "error_type"}
    assert wrong.json()["error_type"] == "validation"
    info = http.get("/info").json()
    assert info["model_id"] == "demo"
    assert info["max_total_tokens"] == 2048
    chat = http.post("/chat_tokenize", json={"messages": USER}).json()
    assert STORY in chat["templated_text"]
    joined = "".join(token["text"] for token in chat["tokenize_response"])
    assert joined == chat["templated_text"]
