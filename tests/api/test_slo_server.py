"""The `slo` policy behind the real server, with the load of benchmarks/goodput.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_bursty_load_is_served_and_its_targets_are_counted(start_server):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    command += ["--scheduling-policy", "slo", "--max-num-seqs", "16", "--log-level", "warning"]
    server = start_server(command).wait_ready()
    load = ["--seconds", "6", "--rate", "4", "--shorter", "40", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/goodput.py"), "--url", server.url, *load],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split()
    assert row[0] == server.url
    text = server.http.get("/metrics").text
    counted = re.findall(r"tokenry:requests_with_targets_total\{[^}]*\} (\S+)", text)
    with_targets = sum(map(float, counted))
    ended = float(re.search(r"tokenry:e2e_request_latency_seconds_count\{[^}]*\} (\S+)", text)[1])
    assert 0 < with_targets <= ended
    assert server.http.get("/health/integrity").json() == {"ok": True}
    priority = {"prompt": "Once", "max_tokens": 2, "priority": 5}
    assert server.http.post("/v1/completions", json=priority).status_code == 200
    assert server.close() == 0
