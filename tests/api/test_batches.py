"""Files and batches: they survive a kill, a full disk loses nothing, live requests go first."""

import json
import re
import resource
import time

import openai
import pytest

ENDED = ("completed", "failed", "expired", "cancelled")
FULL = 64 * 1024


def lines(count, **body):
    wanted = {"model": "demo", "prompt": "Once", "max_tokens": 4, "ignore_eos": True, **body}
    return [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": wanted}
        for i in range(count)
    ]


def client_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def start_batch(client, requests):
    data = "\n".join(json.dumps(line) for line in requests).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )


def until(client, batch, condition):
    for _ in range(1200):
        batch = client.batches.retrieve(batch.id)
        if condition(batch):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def ended(batch):
    return batch.status in ENDED


def answers(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


@pytest.fixture(scope="module")
def server(start_toy, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    server = start_toy({"data_dir": str(data), "max_file_bytes": 200_000}, TOY_STEP_S="0.001")
    yield server.wait_ready()
    server.close()


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def test_a_batch_answers_each_line_once_and_tells_of_those_that_failed(client):
    requests = lines(30)
    requests[7]["body"] = {**requests[7]["body"], "temperature": 9}
    requests[8]["body"] = {**requests[8]["body"], "stream": True}
    batch = until(client, start_batch(client, requests), ended)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (30, 28, 2)
    done = answers(client, batch.output_file_id)
    assert {line["custom_id"] for line in done} == {f"r{i}" for i in range(30)} - {"r7", "r8"}
    assert len(done) == 28
    for line in done:
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["usage"]["completion_tokens"] == 4
    failed = {line["custom_id"]: line for line in answers(client, batch.error_file_id)}
    assert failed["r7"]["response"]["body"]["error"]["param"] == "temperature"
    assert failed["r8"]["response"]["body"]["error"]["param"] == "stream"


def test_wrong_lines_fail_the_batch_and_are_named(client):
    same = lines(2)
    same[1]["custom_id"] = "r0"
    file = "\n".join([json.dumps(same[0]), "nonsense", "", json.dumps(same[1]), '{"custom_id": 3}'])
    found = client.files.create(file=("in.jsonl", file.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=found.id, endpoint="/v1/completions", completion_window="24h"
    )
    batch = until(client, batch, ended)
    assert batch.status == "failed"
    assert [error.line for error in batch.errors.data] == [2, 4, 5]
    assert "duplicate_custom_id" in [error.code for error in batch.errors.data]


def test_files_are_listed_page_by_page_and_deleted(client):
    before = len(list(client.files.list()))
    made = [client.files.create(file=(f"{i}", b"{}"), purpose="batch") for i in range(3)]
    page = client.files.list(limit=2, order="asc")
    assert page.has_next_page()
    assert len(list(client.files.list(limit=2))) == before + 3
    assert client.files.content(made[0].id).content == b"{}"
    assert client.files.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made[0].id)


def test_uploads_that_cannot_be_kept_are_refused_and_leave_nothing(client, server):
    before = len(list(client.files.list()))
    with pytest.raises(openai.BadRequestError) as wrong:
        client.files.create(file=("x", b"{}"), purpose="fine-tune")
    assert wrong.value.param == "purpose"
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=("x", b"x" * 300_000), purpose="batch")
    assert large.value.status_code == 413
    text = {"content-type": "text/plain"}
    assert server.http.post("/v1/files", content=b"x", headers=text).status_code == 415
    broken = {"content-type": "multipart/form-data; boundary=b"}
    answer = server.http.post("/v1/files", content=b"--b\r\nContent-", headers=broken)
    assert answer.status_code == 400
    assert len(list(client.files.list())) == before


def test_what_a_batch_needs_is_named(client):
    file = client.files.create(file=("x", b"{}"), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-0"}, "input_file_id"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.batches.create(**{**asked, **change})
        assert raised.value.param == param


def test_without_a_data_directory_the_mend_is_told(toy):
    for path in ("/v1/files", "/v1/batches"):
        answer = toy.http.get(path)
        assert answer.status_code == 400
        assert "--data-dir" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_cancelled_batch_keeps_what_is_done(start_toy, tmp_path):
    options = {"data_dir": str(tmp_path), "batch_concurrency": 2}
    server = start_toy(options, TOY_STEP_S="0.02").wait_ready()
    with client_of(server) as client:
        batch = start_batch(client, lines(200))
        until(client, batch, lambda b: b.request_counts.completed >= 2)
        with pytest.raises(openai.BadRequestError):
            client.files.delete(batch.input_file_id)
        client.batches.cancel(batch.id)
        batch = until(client, batch, ended)
        assert batch.status == "cancelled"
        done = answers(client, batch.output_file_id)
        assert 2 <= len(done) == batch.request_counts.completed < 200
        assert client.files.delete(batch.input_file_id).deleted
    assert server.http.get("/health/integrity").json() == {"ok": True}
    assert server.close() == 0


@pytest.mark.slow
def test_a_batch_goes_on_after_a_kill_and_answers_each_line_once(start_toy, tmp_path):
    options = {"data_dir": str(tmp_path), "batch_concurrency": 4}
    server = start_toy(options, TOY_STEP_S="0.01").wait_ready()
    with client_of(server) as client:
        batch = start_batch(client, lines(80))
        until(client, batch, lambda b: b.request_counts.completed >= 8)
    server.process.kill()
    server.process.wait(20)
    with (tmp_path / "batches" / f"{batch.id}.out").open("ab") as file:
        file.write(b'{"id": "batch_req_cut')  # what a power cut leaves of a line
    server = start_toy(options, TOY_STEP_S="0.001").wait_ready()
    with client_of(server) as client:
        batch = until(client, batch, ended)
        assert batch.status == "completed"
        done = [line["custom_id"] for line in answers(client, batch.output_file_id)]
        assert sorted(done) == sorted(f"r{i}" for i in range(80))
        assert batch.request_counts.completed == 80
    assert server.close() == 0


@pytest.mark.slow
def test_a_full_disk_stops_a_batch_says_so_and_loses_nothing(start_toy, tmp_path):
    server = start_toy({"data_dir": str(tmp_path)}, TOY_STEP_S="0.001").wait_ready()
    unlimited = resource.RLIM_INFINITY
    with client_of(server) as client:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (FULL, unlimited))
        batch = start_batch(client, lines(300))  # its answers are more than FULL bytes
        batch = until(client, batch, lambda b: b.notice is not None)
        assert "no room" in batch.notice
        with pytest.raises(openai.InternalServerError) as raised:
            client.files.create(file=("x", b"x" * 2 * FULL), purpose="batch")
        assert raised.value.status_code == 507
        assert raised.value.code == "disk_full"
        assert client.completions.create(model="demo", prompt="Once", max_tokens=2).choices
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        batch = until(client, batch, ended)
        assert batch.status == "completed"
        assert batch.notice is None
        done = [line["custom_id"] for line in answers(client, batch.output_file_id)]
        assert sorted(done) == sorted(f"r{i}" for i in range(300))
    assert server.close() == 0


@pytest.mark.slow
def test_batches_wait_while_live_requests_take_half_of_the_engine(start_toy, tmp_path):
    server = start_toy({"data_dir": str(tmp_path)}, TOY_STEP_S="0.02").wait_ready()
    live = {"prompt": "Once", "max_tokens": 400, "n": 32, "ignore_eos": True, "stream": True}
    with client_of(server) as client:
        with server.http.stream("POST", "/v1/completions", json=live) as answer:
            chunks = answer.iter_lines()
            next(chunks)  # 32 of 64 rows are live from here on
            batch = start_batch(client, lines(5))
            until(client, batch, lambda b: b.status == "in_progress")
            for _ in range(2000):
                next(chunks)
            batch = client.batches.retrieve(batch.id)
            assert batch.status == "in_progress"
            assert batch.request_counts.completed == 0
        batch = until(client, batch, ended)
        assert batch.request_counts.completed == 5
    assert server.close() == 0


@pytest.mark.slow
def test_a_line_that_runs_gives_up_its_blocks_for_a_live_request(start_toy, tmp_path):
    options = {"data_dir": str(tmp_path), "batch_concurrency": 2}
    server = start_toy(options, TOY_STEP_S="0.004").wait_ready()
    live = {"prompt": list(range(300, 600)), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with client_of(server) as client:
        requests = lines(2, max_tokens=500, temperature=0, prompt=[300, 301, 302])
        alone = server.http.post("/v1/completions", json=requests[0]["body"]).json()
        batch = start_batch(client, requests)  # 63 blocks in the end, of 64
        until(client, batch, lambda b: b.status == "in_progress")
        while client.batches.retrieve(batch.id).status == "in_progress":
            assert server.http.post("/v1/completions", json=live).status_code == 200
            # as the lines grow, at last there is no room for it beside them
        batch = until(client, batch, ended)
        assert batch.request_counts.completed == 2
        for line in answers(client, batch.output_file_id):
            assert line["response"]["body"]["choices"][0]["text"] == alone["choices"][0]["text"]
    for _ in range(300):  # counts come once a second
        counts = re.findall(r"num_preemptions_total{.*} (\S+)", server.http.get("/metrics").text)
        if any(map(float, counts)):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("no line was preempted")
    assert server.http.get("/health/integrity").json() == {"ok": True}
    assert server.close() == 0


def test_two_servers_cannot_share_a_data_directory(start_toy, tmp_path):
    first = start_toy({"data_dir": str(tmp_path)}).wait_ready()
    with pytest.raises(AssertionError, match="in use by another server"):
        start_toy({"data_dir": str(tmp_path)})
    assert first.close() == 0
