"""GET /live and /live/backends, and the page's document."""

import base64
import hashlib
import json
import re
import subprocess
import sys


def test_live_tells_requests_totals_and_times(toy):
    before = toy.http.get("/live").json()
    body = {"prompt": "Once", "max_tokens": 6, "ignore_eos": True, "stream": True}
    toy.http.post("/v1/completions", json=body).raise_for_status()
    after = toy.http.get("/live").json()
    assert after["now_s"] > before["now_s"]
    (old,), (new,) = before["models"], after["models"]
    assert (new["id"], new["state"], new["cause"]) == ("demo", "ready", None)
    assert set(new["requests"]) == {"queued", "prefill", "decode"}
    assert sum(new["totals"]["finished"].values()) - sum(old["totals"]["finished"].values()) == 1
    for name, gained in (("ttft_s", 1), ("itl_s", 5), ("e2e_s", 1)):
        bounds, counts = new["times"][name]["bounds"], new["times"][name]["counts"]
        assert counts[-1] - old["times"][name]["counts"][-1] == gained, name
        assert counts == sorted(counts)
        assert bounds[-1] is None
        assert bounds[:-1] == sorted(bounds[:-1])
    facts = new["facts"]
    assert facts["max_model_len"] == 512
    assert facts["num_blocks"] * facts["block_size"] > 0
    text = json.dumps(after)
    assert "Once" not in text, "nothing of a request's text"


def test_live_backends_are_those_of_tokenry_devices(toy):
    told = toy.http.get("/live/backends").json()["data"]
    command = [sys.executable, "-m", "tokenry", "devices", "--all", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == json.loads(printed)
    (cpu,) = (row for row in told if row["backend"] == "cpu")
    assert cpu["state"] == "usable"
    assert cpu["device"]["score"] == 1
    assert {row["state"] for row in told} >= {"usable", "simulator"}
    assert all(row["reason"] or row["device"] for row in told)


def test_live_needs_the_key_and_the_page_does_not(start_toy):
    server = start_toy({"api_key": ["k"]}).wait_ready()
    for path in ("/live", "/live/backends"):
        assert server.http.get(path).status_code == 401
        answer = server.http.get(path, headers={"authorization": "Bearer k"})
        assert answer.status_code == 200
    assert server.http.get("/").status_code == 200
    server.close()


def test_the_pages_policy_allows_its_own_script_and_no_other(toy):
    answer = toy.http.get("/")
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "/*" not in re.findall(r"<style>(.{20})", answer.text, re.S)[0]
