"""What a key leaves with the server is its own: to another key it is not there."""

import json
import time

import openai
import pytest

ENDED = ("completed", "failed", "expired", "cancelled")
RESPONSE = {"model": "demo", "input": "Once", "max_output_tokens": 4}


def client_of(server, key):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def upload(client, *bodies, url="/v1/responses"):
    lines = [
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body})
        for i, body in enumerate(bodies)
    ]
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")


def run(client, file, url="/v1/responses"):
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    for _ in range(600):
        if client.batches.retrieve(batch.id).status in ENDED:
            return client.batches.retrieve(batch.id)
        time.sleep(0.05)
    raise AssertionError(batch)


def results(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


@pytest.fixture(scope="module")
def started(start_toy, tmp_path_factory):
    data = tmp_path_factory.mktemp("owned")
    options = {"data_dir": str(data), "api_key": ["ann", "ben"], "admin_key": ["ada"]}
    server = start_toy(options, TOY_STEP_S="0.001").wait_ready()
    yield server, data
    server.close()


@pytest.fixture
def keys(started):
    with (
        client_of(started[0], "ann") as ann,
        client_of(started[0], "ben") as ben,
        client_of(started[0], "ada") as ada,
    ):
        yield ann, ben, ada


def test_files_are_seen_by_their_key_alone_and_by_an_admin(keys):
    ann, ben, ada = keys
    mine, theirs = upload(ann, RESPONSE), upload(ben, RESPONSE)
    assert "owner" not in mine.to_dict()
    assert mine.id in [file.id for file in ann.files.list()]
    assert theirs.id not in [file.id for file in ann.files.list()]
    for ask in (ben.files.retrieve, ben.files.content, ben.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(mine.id)
    assert ann.files.content(mine.id).text
    assert {mine.id, theirs.id} <= {file.id for file in ada.files.list()}
    assert ada.files.retrieve(mine.id) == ann.files.retrieve(mine.id)
    assert ada.files.delete(theirs.id).deleted


def test_batches_and_what_they_write_are_their_keys_own(keys):
    ann, ben, ada = keys
    file = upload(ann, RESPONSE)
    with pytest.raises(openai.BadRequestError) as unknown:
        ben.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    assert unknown.value.param == "input_file_id"
    batch = run(ann, file)
    assert batch.status == "completed"
    assert "owner" not in batch.to_dict()
    for ask in (ben.batches.retrieve, ben.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(batch.id)
    assert batch.id not in [one.id for one in ben.batches.list()]
    assert batch.id in [one.id for one in ann.batches.list()]
    assert batch.id in [one.id for one in ada.batches.list()]
    with pytest.raises(openai.NotFoundError):
        ben.files.content(batch.output_file_id)
    (answer,) = results(ann, batch.output_file_id)
    stored = answer["response"]["body"]["id"]
    assert ann.responses.retrieve(stored).id == stored
    with pytest.raises(openai.NotFoundError):
        ben.responses.retrieve(stored)


def test_stored_responses_are_their_keys_own_in_batches_too(keys):
    ann, ben, _ = keys
    mine = ann.responses.create(**RESPONSE)
    assert ann.responses.retrieve(mine.id).id == mine.id
    for ask in (
        ben.responses.retrieve,
        ben.responses.delete,
        ben.responses.cancel,
        ben.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError):
            ask(mine.id)
    with pytest.raises(openai.BadRequestError) as unknown:
        ben.responses.create(**RESPONSE, previous_response_id=mine.id)
    assert unknown.value.param == "previous_response_id"
    going_on = {**RESPONSE, "previous_response_id": mine.id}
    batch = run(ben, upload(ben, going_on))
    (refused,) = results(ben, batch.error_file_id)
    assert refused["response"]["body"]["error"]["param"] == "previous_response_id"
    batch = run(ann, upload(ann, going_on))
    (answered,) = results(ann, batch.output_file_id)
    assert answered["response"]["body"]["previous_response_id"] == mine.id


@pytest.mark.slow
def test_owners_outlive_a_restart_and_without_keys_all_is_seen(started, keys, start_toy):
    server, data = started
    file = upload(keys[0], RESPONSE)
    server.close()
    again = start_toy({"data_dir": str(data), "api_key": ["ben", "ann"]}).wait_ready()
    with client_of(again, "ann") as ann, client_of(again, "ben") as ben:
        assert ann.files.retrieve(file.id).id == file.id
        with pytest.raises(openai.NotFoundError):
            ben.files.retrieve(file.id)
        mine = {one.id for one in ann.files.list()}
    again.close()
    public = start_toy({"data_dir": str(data)}).wait_ready()
    with client_of(public, "none") as anybody:
        assert mine < {one.id for one in anybody.files.list()}
        assert "owner" not in anybody.files.retrieve(file.id).to_dict()
    public.close()
