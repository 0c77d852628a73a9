"""Start, disconnect, death, drain: the server's life, seen from outside."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

BODY = {"prompt": "Once", "max_tokens": 400, "temperature": 0}


def gauge(server, name):
    text = server.http.get("/metrics").text
    return float(re.search(rf"^tokenry:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)[1])


def until(check):
    for _ in range(1000):
        if check():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def engine_pid(server):
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return int(children.split()[0])


def test_fifty_connections_opened_and_closed_leave_nothing(toy):
    host, port = toy.url.removeprefix("http://").split(":")
    aborted = gauge(toy, "requests_aborted_total")
    for i in range(50):
        stream = "true" if i % 2 else "false"
        body = f'{{"prompt":"Once {i}","max_tokens":400,"stream":{stream}}}'
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            time.sleep(0.02)
    until(lambda: gauge(toy, "num_requests_running") + gauge(toy, "num_requests_waiting") == 0)
    assert gauge(toy, "requests_aborted_total") > aborted
    assert toy.http.get("/health/integrity").json() == {"ok": True}


def test_loading_server_answers_503_with_its_phase(start_toy):
    server = start_toy(TOY_LOAD_S="2")
    until(lambda: server.http.get("/readyz").json().get("phase") == "toy weights")
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["progress"]) == (503, 0.5)
    assert server.http.get("/livez").status_code == 200
    refused = server.http.post("/v1/completions", json=BODY)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert "toy weights" in refused.json()["error"]["message"]
    assert server.wait_ready().close() == 0


def test_killed_engine_is_told_to_every_waiting_request(start_toy):
    server = start_toy(TOY_STEP_S="0.02").wait_ready()
    answers = []

    def ask(stream):
        body = {**BODY, "stream": stream}
        answers.append(server.http.post("/v1/completions", json=body))

    threads = [threading.Thread(target=ask, args=(s,)) for s in (False, True, False)]
    for thread in threads:
        thread.start()
    until(lambda: gauge(server, "num_requests_running") == 3)
    os.kill(engine_pid(server), signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert sorted(a.status_code for a in answers) == [200, 503, 503]
    streamed = next(a for a in answers if a.status_code == 200).text
    assert '"code":"engine_dead"' in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    ready = server.http.get("/readyz")
    assert ready.status_code == 503
    assert "SIGKILL" in ready.json()["cause"]
    assert server.http.get("/livez").status_code == 200
    assert gauge(server, "num_requests_running") == 0
    assert gauge(server, "kv_cache_usage_perc") == 0
    models = server.http.get("/v1/models")
    assert (models.status_code, models.json()["error"]["code"]) == (503, "engine_dead")
    assert server.http.get("/v1/models/demo").status_code == 503
    told = [line for line in server.end() if "SIGKILL" in line]
    assert len(told) == 1
    assert "503 from now on" in told[0]


def test_a_silent_engine_is_told_until_it_answers_again(start_toy):
    server = start_toy({"heartbeat_timeout_s": 1}).wait_ready()
    engine = engine_pid(server)
    os.kill(engine, signal.SIGSTOP)
    until(lambda: server.http.get("/readyz").status_code == 503)
    state = server.http.get("/readyz").json()
    assert state["status"] == "stalled"
    assert f"process {engine}" in state["cause"]
    assert server.http.get("/livez").status_code == 200
    os.kill(engine, signal.SIGCONT)
    until(lambda: server.http.get("/readyz").status_code == 200)
    assert server.http.post("/v1/completions", json={**BODY, "max_tokens": 3}).status_code == 200
    text = "".join(server.end())
    assert text.count("No sign of life") == 1
    assert text.count("answers again") == 1


def test_a_step_without_end_is_told(start_toy):
    server = start_toy({"step_timeout_s": 1}, TOY_STEP_S="4").wait_ready()
    answers = []
    body = {**BODY, "max_tokens": 1}
    thread = threading.Thread(
        target=lambda: answers.append(server.http.post("/v1/completions", json=body))
    )
    thread.start()
    until(lambda: server.http.get("/readyz").status_code == 503)
    assert "one step" in server.http.get("/readyz").json()["cause"]
    thread.join(20)
    assert answers[0].status_code == 200
    until(lambda: server.http.get("/readyz").status_code == 200)
    server.close()


def test_sigterm_lets_running_requests_finish(start_toy):
    server = start_toy(TOY_STEP_S="0.01").wait_ready()
    answers = []
    body = {**BODY, "max_tokens": 100}
    thread = threading.Thread(
        target=lambda: answers.append(server.http.post("/v1/completions", json=body))
    )
    thread.start()
    until(lambda: gauge(server, "num_requests_running") == 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.http.get("/readyz").status_code == 503)
    thread.join(20)
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(20) == 0


def test_a_signal_to_the_whole_group_drains_as_one_to_the_server(start_toy):
    """What systemd, a container's end and Ctrl-C do: the engine gets the signal, too."""
    server = start_toy(TOY_STEP_S="0.01").wait_ready()
    answers = []
    body = {**BODY, "max_tokens": 100, "stream": True}
    thread = threading.Thread(
        target=lambda: answers.append(server.http.post("/v1/completions", json=body).text)
    )
    thread.start()
    until(lambda: gauge(server, "num_requests_running") == 1)
    os.kill(engine_pid(server), signal.SIGTERM)
    os.kill(engine_pid(server), signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert '"finish_reason":"length"' in answers[0]
    assert "error" not in answers[0]
    assert server.process.wait(20) == 0
    server.reader.join(20)
    assert "Traceback" not in "".join(server.lines)


def test_a_second_signal_ends_streams_with_an_error_frame(start_toy):
    server = start_toy(TOY_STEP_S="0.05").wait_ready()
    texts = []
    body = {**BODY, "stream": True}
    threads = [
        threading.Thread(
            target=lambda: texts.append(server.http.post("/v1/completions", json=body).text)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: gauge(server, "num_requests_running") == 2)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: "draining" in "".join(server.lines))
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    for text in texts:
        error, done = text.rstrip().split("\n\n")[-2:]
        assert '"code":"engine_dead"' in error
        assert "shut down" in error
        assert done == "data: [DONE]"
    assert server.process.wait(20) == 0
    server.reader.join(20)
    assert "Traceback" not in "".join(server.lines)


def test_a_signal_while_the_model_loads_ends_the_server(start_toy):
    server = start_toy(TOY_LOAD_S="30")
    until(lambda: server.http.get("/readyz").json().get("phase") == "toy weights")
    engine = engine_pid(server)
    os.kill(engine, signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    assert not Path(f"/proc/{engine}").exists()


def test_failed_start_prints_one_cause_and_its_mend(start_toy):
    server = start_toy(TOY_FAIL="1")
    assert server.process.wait(20) == 1
    server.reader.join(20)
    text = "".join(server.lines)
    assert "The toy is broken." in text
    assert "glue it" in text


def test_port_in_use_is_known_before_the_model_loads(toy):
    port = toy.url.rpartition(":")[2]
    command = [sys.executable, "-m", "tokenry", "serve", "demo", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--port" in done.stderr
    assert "loading" not in done.stderr


def test_page_is_one_file_without_foreign_assets(toy):
    page = toy.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", page.text)
