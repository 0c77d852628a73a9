"""A served engine whose device has no memory for a step, and later is lost: what clients see."""

from __future__ import annotations

import re
import threading
import time

import pytest


def gauge(server, name):
    text = server.http.get("/metrics").text
    return float(re.search(rf"^tokenry:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)[1])


def until(check):
    for _ in range(1000):
        if check():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_no_memory_is_not_noticed_and_a_lost_device_is_told_to_all_at_once(start_server):
    server = start_server(
        [
            *("-m", "tokenry", "serve", "demo", "--port", "0", "--backend", "sim-cuda"),
            *("--backend-option", "oom_at=2,5", "--backend-option", "lost_at=40"),
            *("--max-model-len", "256", "--num-kv-blocks", "80", "--max-num-seqs", "4"),
        ]
    ).wait_ready()
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    first = server.http.post("/v1/completions", json=body)
    again = server.http.post("/v1/completions", json=body)
    assert first.status_code == 200
    assert first.json()["choices"][0]["text"] == again.json()["choices"][0]["text"]
    until(lambda: gauge(server, "device_out_of_memory_total") == 2)
    assert gauge(server, "step_failures_total") == 0

    answers = []

    def ask(stream):
        long = {**body, "max_tokens": 200, "stream": stream}
        answers.append(server.http.post("/v1/completions", json=long))

    threads = [threading.Thread(target=ask, args=(s,)) for s in (False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(a.status_code for a in answers) == [200, 503, 503]
    cause = "The simulated device was lost in launch 40."
    for answer in answers:
        assert '"code":"engine_dead"' in answer.text
        assert cause in answer.text
    ready = server.http.get("/readyz")
    assert ready.status_code == 503
    assert cause in ready.json()["cause"]
    assert server.http.post("/v1/completions", json=body).status_code == 503
    lines = server.end()
    assert len([line for line in lines if cause in line]) == 1
    assert not any("Traceback" in line for line in lines)
    assert sum("had no device memory and is tried again" in line for line in lines) == 2
