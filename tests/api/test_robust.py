"""What no honest client sends: the answer is a clear 4xx, after a bounded number of bytes."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

ASKED = {"model": "demo", "prompt": "Once", "max_tokens": 3}


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def status_of(data):
    found = re.match(rb"HTTP/1\.1 (\d{3})", data)
    return int(found[1]) if found else None


def exchange(server, data):
    """What the server answers to these bytes until it closes or is silent."""
    with connect(server) as conn:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            conn.sendall(data)
        answer = b""
        try:
            while part := conn.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except (ConnectionResetError, TimeoutError):
            pass
        return answer


def post(path, body, length=None):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return (head + f"Content-Length: {length or len(body)}\r\n\r\n").encode() + body


def still_serves(server):
    assert server.http.post("/v1/completions", json=ASKED).status_code == 200
    assert server.http.get("/health/integrity").json() == {"ok": True}


DEEP = b"[" * 100_000 + b"]" * 100_000
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"messages": ' + DEEP + b"}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"null",
        b"",
        b'{"prompt": 1e999}',
        b"\x00" * 1000,
    ],
    ids=["deep", "deep messages", "utf-8", "surrogate", "null", "empty", "infinity", "zeros"],
)
def test_bodies_that_are_no_request(toy, route, body):
    answer = toy.http.post(route, content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"stop": ["x"] * 100_000},
        {"stop": ["x" * 10_000_000]},
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"prompt": [1] * 1_000_000},
        {"prompt": ["a"] * 100_000},
        {"prompt": "king " * 6_000_000},
        {"bad_words": [f"w{i}" for i in range(100_000)]},
        {"bad_words": ["w" * 1_000_000]},
        {"dry_multiplier": 1.0, "dry_sequence_breakers": [f"w{i}" for i in range(100_000)]},
        {"dry_sequence_breakers": "[" * 1_000_000},
        {"n": 10**9},
        {"max_tokens": 10**30},
        {"seed": 10**30},
        {"metadata": {"a": "b" * 10_000_000}, "temperature": 5},
    ],
    ids=lambda body: next(iter(body)) if isinstance(body, dict) else None,
)
def test_ten_megabytes_of_something_are_refused_by_name(toy, body):
    answer = toy.http.post("/v1/completions", json={**ASKED, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]
    still_serves(toy)


@pytest.mark.parametrize(
    ("route", "counted"), [("/tokenize", "count"), ("/v1/messages/count_tokens", "input_tokens")]
)
def test_tokens_of_messages_far_beyond_the_context_are_counted(toy, route, counted):
    messages = [{"role": "user", "content": "king " * 20_000}]
    answer = toy.http.post(route, json={"model": "demo", "messages": messages})
    assert answer.status_code == 200, answer.text
    assert answer.json()[counted] > 20_000


def test_a_text_that_is_encoded_whole_keeps_nobody_waiting(toy):
    """/tokenize gives all tokens, however many; the server answers others meanwhile."""
    text, answered = "king " * 400_000, 0
    thread = threading.Thread(
        target=lambda: toy.http.post("/tokenize", json={"prompt": text}, timeout=60)
    )
    thread.start()
    while thread.is_alive():
        assert toy.http.get("/livez").status_code == 200
        answered += 1
    assert answered > 20  # else the first of them would have waited for all of it


def test_a_body_above_the_limit_is_refused_before_it_is_read(toy):
    announced = post("/v1/completions", b"{", length=10**12)
    assert status_of(exchange(toy, announced)) == 413
    chunks = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunks += b"Transfer-Encoding: chunked\r\n\r\n"
    chunks += (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 40
    assert status_of(exchange(toy, chunks)) == 413
    still_serves(toy)


def test_a_flood_of_headers_ends_after_a_bounded_number_of_bytes(toy):
    """A head may have 64 KiB; what is sent beyond is never stored."""
    sent = 0
    with connect(toy) as conn:
        conn.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        line = b"X-Flood: " + b"y" * 8000 + b"\r\n"
        try:
            while sent < 64 << 20:
                conn.sendall(line)
                sent += len(line)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            answer = conn.recv(65536)
        except ConnectionResetError:
            answer = b""
    assert status_of(answer) in (None, 400, 431)
    assert sent < 64 << 20
    still_serves(toy)


def test_what_is_no_http_is_a_400(toy):
    for data in (b"\x16\x03\x01\x00\xa5", b"GET\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n"):
        assert status_of(exchange(toy, data)) in (None, 400)
    still_serves(toy)


def connections(server):
    """Sockets of clients that the server holds, in any state."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(1 for connection in found if connection.raddr)


def test_connections_that_are_opened_and_dropped_leak_nothing(toy):
    still_serves(toy)
    request = post("/v1/completions", json.dumps({**ASKED, "stream": True}).encode())
    for i in range(1000):
        with connect(toy) as conn:
            conn.sendall(request[: len(request) * (i % 11) // 10])
    for _ in range(300):  # aborts of the requests that were whole take their turn
        left = connections(toy)
        if left <= 1:  # the test's own
            break
        time.sleep(0.1)
    assert left <= 1
    still_serves(toy)


LONG = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400},
    "/v1/completions": {**ASKED, "max_tokens": 400},
    "/v1/responses": {"input": "x", "max_output_tokens": 400},
    "/v1/messages": {
        "model": "demo",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 400,
    },
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 400}},
    "/completion": {"prompt": "x", "n_predict": 400},
}


def ended_by_length(server):
    text = server.http.get("/metrics").text
    pattern = r'^tokenry:request_success_total{finished_reason="length".*} (\S+)$'
    return float(re.search(pattern, text, re.M)[1])


@pytest.mark.parametrize("route", LONG)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_in_every_dialect(toy, route, stream):
    before = ended_by_length(toy)
    for _ in range(10):
        with connect(toy) as conn:
            conn.sendall(post(route, json.dumps({**LONG[route], "stream": stream}).encode()))
            if stream:
                assert status_of(conn.recv(100)) == 200
    for _ in range(200):
        text = toy.http.get("/metrics").text
        left = re.findall(r"^tokenry:num_requests_(?:running|waiting){.*} (\S+)$", text, re.M)
        if left and not any(map(float, left)):
            break
        time.sleep(0.05)
    assert not any(map(float, left)), left
    assert ended_by_length(toy) == before  # none ran to its end
    still_serves(toy)


def test_a_reader_that_does_not_read_keeps_nobody_waiting(toy):
    """It is dropped from no step and holds its own stream only."""
    long = {**ASKED, "max_tokens": 400, "n": 8, "stream": True, "ignore_eos": True}
    slow = []
    for _ in range(4):
        conn = connect(toy)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn.sendall(post("/v1/completions", json.dumps(long).encode()))
        slow.append(conn)
    answer = toy.http.post("/v1/completions", json={**ASKED, "max_tokens": 50})
    assert answer.json()["usage"]["completion_tokens"] == 50
    for conn in slow:
        conn.close()
    still_serves(toy)


@pytest.mark.slow
def test_run_batch_answers_a_file_and_goes_on_where_it_ended(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": ASKED},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": 3}},
    ]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    command = [sys.executable, "-m", "tokenry", "run-batch", "-i", str(source), "-o", str(target)]
    command += ["--model", "demo", "--backend", "cpu", "--kv-cache-bytes", "64MiB", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # one line failed
    results = {r["custom_id"]: r["response"] for r in map(json.loads, target.open())}
    assert {name: r["status_code"] for name, r in results.items()} == {"a": 200, "b": 200, "c": 400}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    kept = "".join(line for line in target.open() if '"c"' not in line)
    target.write_text(kept + '{"half')
    source.write_text(source.read_text().replace('{"prompt": 3}', json.dumps(ASKED)))
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(json.loads(line)["custom_id"] for line in target.open()) == ["a", "b", "c"]
