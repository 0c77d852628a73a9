"""Keys and what each may have: the file, its changes, rates and answers at once."""

import json
import math
import threading
import time

import pytest

from tokenry.api.keys import Key, KeyFile, KeyRing, digest, read_keys, write_keys
from tokenry.api.limits import Bucket, Limits, QuotaExceeded
from tokenry.errors import ConfigError

BODY = {"prompt": "Once", "max_tokens": 4, "temperature": 0}


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def key(name="ann", text="secret", **limits):
    return Key(name=name, sha256=digest(text), **limits)


def test_bucket_gives_a_minutes_worth_at_once_and_refills_evenly():
    bucket = Bucket(60, 0.0)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(30, 10.0) == pytest.approx(20.0)
    assert bucket.wait_s(1, 10.0) == 0
    assert bucket.level(1e6) == 60  # it holds no more
    assert bucket.wait_s(61, 1e6) == math.inf


def test_answers_tokens_are_owed_and_the_next_request_waits_for_them():
    clock = Clock()
    account = Limits(clock).account(key(tokens_per_minute=600))
    account.begin()
    account.take_prompt(100)
    account.take_answer(900)  # 400 more than there were
    with pytest.raises(QuotaExceeded) as caught:
        account.begin()
    assert caught.value.retry_after_s == pytest.approx(40.1)
    clock.now_s += 40.2
    account.begin()


def test_a_prompt_larger_than_a_minutes_worth_is_told_that_it_never_fits():
    account = Limits(Clock()).account(key(tokens_per_minute=10))
    with pytest.raises(QuotaExceeded, match="needs 11 tokens") as caught:
        account.take_prompt(11)
    assert caught.value.retry_after_s is None


def test_a_refused_request_takes_nothing():
    account = Limits(Clock()).account(key(requests_per_minute=1, max_concurrent=1))
    account.begin()
    for _ in range(3):
        with pytest.raises(QuotaExceeded, match="under way"):
            account.begin()
    account.end()
    with pytest.raises(QuotaExceeded, match="1 requests per minute"):
        account.begin()
    assert account.num_active == 0


def test_changed_limits_bind_at_once_and_the_unchanged_ones_keep_what_was_used():
    limits = Limits(Clock())
    limits.account(key(requests_per_minute=5, tokens_per_minute=50)).take_prompt(50)
    account = limits.account(key(requests_per_minute=9, tokens_per_minute=50))
    with pytest.raises(QuotaExceeded, match="50 tokens per minute"):
        account.begin()


def test_file_is_read_anew_when_it_changes_and_kept_when_it_goes_wrong(tmp_path, caplog):
    path, clock = tmp_path / "keys.json", Clock()
    write_keys(path, KeyFile(keys=(key(),)))
    assert path.stat().st_mode & 0o077 == 0
    ring = KeyRing(["plain"], str(path), clock=clock)
    assert ring.find("secret").name == "ann"
    assert ring.find("plain") is not None
    write_keys(path, KeyFile(keys=(key("ben", "other"),)))
    assert ring.find("secret") is not None  # not looked at yet
    clock.now_s += 2
    assert (ring.find("secret"), ring.find("other").name) == (None, "ben")
    path.write_text("{")
    clock.now_s += 2
    assert ring.find("other").name == "ben"
    assert "stay as they were" in caplog.text
    assert ring.find("plain").name == "api-key-0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "keys.json"),
        ('{"keys": [{"name": "a", "sha256": "12"}]}', "64 hex digits"),
        ('{"keys": [{"name": "a", "sha256": "%s", "rpm": 3}]}' % ("0" * 64), "rpm"),
        ('{"keys": [{"name": "a", "sha256": "%s", "ttft_ms": 0}]}' % ("0" * 64), "above 0"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}), "two keys"),
    ],
    ids=["list", "hash", "field", "limit", "twice"],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_keys(path)


def test_a_keys_priority_needs_a_queue_that_knows_them(tmp_path):
    write_keys(tmp_path / "k", KeyFile(keys=(key(priority=3),)))
    with pytest.raises(ConfigError, match="--scheduling-policy"):
        KeyRing(file=str(tmp_path / "k"), priorities=False)


@pytest.fixture(scope="module")
def served(start_toy, tmp_path_factory):
    """A server with a key file: ann is limited, bea is not, ada is an admin."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = (
        key("ann", "a", requests_per_minute=3, max_concurrent=1),
        key("bea", "b"),
        key("tok", "t", tokens_per_minute=100),
        key("ada", "d", admin=True),
    )
    write_keys(path, KeyFile(keys=keys))
    server = start_toy({"api_keys_file": str(path)}, TOY_STEP_S="0.01").wait_ready()
    yield server, path
    server.close()


def ask(server, text, **more):
    return server.http.post(
        "/v1/completions", json={**BODY, **more}, headers={"authorization": f"Bearer {text}"}
    )


def test_keys_let_in_and_others_do_not_but_probes_stay_open(served):
    server, _ = served
    assert ask(server, "b").status_code == 200
    refused = ask(server, "x")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["x-request-id"]
    anthropic = {"x-api-key": "b"}
    assert server.http.post("/v1/completions", json=BODY, headers=anthropic).status_code == 200
    for path in ("/health", "/livez", "/readyz", "/metrics", "/version", "/"):
        assert server.http.get(path).status_code == 200, path
    assert server.http.get("/v1/models").status_code == 401
    assert 'requests_refused_total{model_name="demo",reason="invalid_api_key"}' in (
        server.http.get("/metrics").text
    )


def test_requests_per_minute_and_at_once_are_429_with_the_time_to_wait(served):
    server, _ = served
    done = threading.Event()

    def long():
        ask(server, "a", max_tokens=150)
        done.set()

    threading.Thread(target=long).start()
    for _ in range(200):
        refused = ask(server, "a", max_tokens=1)
        if refused.status_code == 429:
            break
        time.sleep(0.01)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"]) == (429, "rate_limit_error")
    assert error["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert done.wait(30)
    codes = [ask(server, "a", max_tokens=1).status_code for _ in range(4)]
    assert codes[-1] == 429
    refused = ask(server, "a", max_tokens=1)
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert ask(server, "b").status_code == 200  # nobody else pays


def test_tokens_per_minute_count_prompt_and_answer(served):
    server, _ = served
    assert ask(server, "t", max_tokens=120).status_code == 200
    refused = ask(server, "t")
    assert refused.status_code == 429
    assert "tokens per minute" in refused.json()["error"]["message"]
    never = ask(server, "t", prompt=list(range(300, 401)))
    assert never.status_code == 429


def test_admin_paths_need_an_admins_key(served):
    server, _ = served
    for text, status in (("b", 403), ("x", 401)):
        answer = server.http.get("/admin/models", headers={"authorization": f"Bearer {text}"})
        assert answer.status_code == status


def test_a_key_that_is_removed_while_the_server_runs_is_refused(served):
    server, path = served
    assert ask(server, "b").status_code == 200
    keys = read_keys(path).keys
    write_keys(path, KeyFile(keys=tuple(k for k in keys if k.name != "bea")))
    for _ in range(60):
        if ask(server, "b").status_code == 401:
            break
        time.sleep(0.1)
    assert ask(server, "b").status_code == 401
    write_keys(path, KeyFile(keys=keys))


def test_without_an_admin_key_nobody_manages(toy):
    answer = toy.http.post("/admin/models/demo/unload")
    assert answer.status_code == 403
    assert "--admin-key" in answer.json()["error"]["message"]


def test_metrics_can_be_closed(start_toy):
    server = start_toy({"api_key": ["k"], "public_metrics": False}).wait_ready()
    assert server.http.get("/metrics").status_code == 401
    assert server.http.get("/readyz").status_code == 200
    server.close()


def test_a_full_queue_is_503_with_the_time_to_wait_and_never_429(start_toy):
    server = start_toy({"max_queue": 0}, TOY_STEP_S="0.02").wait_ready()  # 64 may run
    thread = threading.Thread(target=lambda: ask(server, "none", max_tokens=20, n=64))
    thread.start()
    for _ in range(200):
        refused = ask(server, "none")
        if refused.status_code != 200:
            break
        time.sleep(0.01)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert 'requests_refused_total{model_name="demo",reason="overloaded"}' in (
        server.http.get("/metrics").text
    )
    thread.join(30)
    assert ask(server, "none").status_code == 200
    always = ask(server, "none", n=65)
    assert (always.status_code, always.json()["error"]["param"]) == (400, "n")
    server.close()
