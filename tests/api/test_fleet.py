"""Several models behind one port: routing, the admin's wishes, and an engine that dies."""

import json
import os
import re
import signal
import threading
import time

import pytest

from tokenry.api.fleet import names_of
from tokenry.config import EngineConfig, ServerConfig, load
from tokenry.errors import ConfigError
from tokenry.hub import find_model

CODE = (
    "import sys, json; from tokenry.api.server import serve; "
    "from tokenry.config import EngineConfig, ServerConfig, load; "
    "models, given = json.loads(sys.argv[1]); "
    "sys.exit(serve([EngineConfig(model=m, backend='cpu', max_num_seqs=64) for m in models], "
    "load(ServerConfig, given), factory='toy_engine:make'))"
)
BODY = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
ADMIN = {"authorization": "Bearer boss"}


def until(check):
    for _ in range(1500):
        if check():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="module")
def other():
    """The demo model under another name: its directory."""
    return str(find_model("demo"))


@pytest.fixture(scope="module")
def fleet(start_server, other):
    options = {"port": 0, "alias": [f"tales={other}"], "admin_key": ["boss"]}
    command = ["-c", CODE, json.dumps([["demo", other], options])]
    server = start_server(command, TOY_STEP_S="0.002").wait_ready()
    yield server
    server.close()


def admin(server, name, action):
    return server.http.post(f"/admin/models/{name}/{action}", headers=ADMIN)


def ask(server, **more):
    return server.http.post("/v1/completions", json={**BODY, **more})


def states(server):
    data = server.http.get("/admin/models", headers=ADMIN).json()["data"]
    return {model["id"]: model["state"] for model in data}


def test_requests_go_to_the_model_that_they_name(fleet, other):
    listed = {m["id"]: m["root"] for m in fleet.http.get("/v1/models").json()["data"]}
    assert listed == {"demo": "demo", "tales": other, other: other}
    for name in ("demo", "tales", other, None):
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = {**BODY, "model": name, "messages": [{"role": "user", "content": "x"}]}
            body.pop(
                "messages" if path.endswith("/completions") and "chat" not in path else "prompt"
            )
            answer = fleet.http.post(path, json={k: v for k, v in body.items() if v is not None})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == (name or "demo")
    unknown = ask(fleet, model="who")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "tales" in unknown.json()["error"]["message"]
    text = fleet.http.get("/metrics").text
    for model, count in (("demo", 4), ("tales", 4)):
        name = f'tokenry:e2e_request_latency_seconds_count{{model_name="{model}"}}'
        assert float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1]) == count
    pids = {m["pid"] for m in fleet.http.get("/admin/models", headers=ADMIN).json()["data"]}
    assert len(pids) == 2


def test_a_body_that_is_no_json_is_refused_as_with_one_model(fleet):
    headers = {"content-type": "application/json"}
    assert fleet.http.post("/v1/completions", content=b"{", headers=headers).status_code == 400
    assert fleet.http.post("/v1/completions", content=b"{}", headers=headers).status_code == 400
    assert fleet.http.post("/v1/completions", content=b"x").status_code == 415
    large = b'{"prompt":"' + b"x" * (33 * 2**20)
    assert fleet.http.post("/v1/completions", content=large, headers=headers).status_code == 413
    assert ask(fleet, model=7).status_code == 400


def test_unloaded_model_is_gone_until_it_is_loaded_and_the_other_serves_on(fleet):
    before = admin(fleet, "tales", "load").json()["pid"]
    unloaded = admin(fleet, "tales", "unload").json()
    assert (unloaded["state"], unloaded["pid"]) == ("unloaded", None)
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    refused = ask(fleet, model="tales")
    assert refused.status_code == 503
    assert "/admin/models/tales/load" in refused.json()["error"]["message"]
    assert ask(fleet, model="demo").status_code == 200
    assert fleet.http.get("/readyz").status_code == 200
    assert "tales" not in {m["id"] for m in fleet.http.get("/v1/models").json()["data"]}
    assert admin(fleet, "tales", "load").json()["state"] == "ready"
    assert ask(fleet, model="tales").status_code == 200


def test_a_sleeping_model_is_woken_by_its_next_request(fleet):
    assert admin(fleet, "tales", "sleep").json() | {"pid": None} == {
        **admin(fleet, "tales", "sleep").json(),
        "state": "sleeping",
    }
    assert states(fleet) == {"demo": "ready", "tales": "sleeping"}
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(fleet, model="tales").status_code))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [200, 200, 200]
    assert states(fleet)["tales"] == "ready"
    admin(fleet, "tales", "sleep")
    assert admin(fleet, "tales", "wake").json()["state"] == "ready"


def test_requests_under_way_end_before_their_model_is_unloaded(fleet):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(ask(fleet, model="tales", max_tokens=300))
    )
    thread.start()
    until(lambda: any(
        m["active"] for m in fleet.http.get("/admin/models", headers=ADMIN).json()["data"]
    ))  # fmt: skip
    assert admin(fleet, "tales", "sleep").json()["state"] == "sleeping"
    thread.join(20)
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"


def test_the_admin_may_add_a_model_while_others_serve(fleet, tmp_path, other):
    again = tmp_path / "again"
    again.symlink_to(other)
    body = {"model": str(again), "alias": ["new"]}
    assert fleet.http.post("/admin/models", json=body).status_code == 401
    added = fleet.http.post("/admin/models", json=body, headers=ADMIN)
    assert (added.status_code, added.json()["state"]) == (201, "ready")
    assert ask(fleet, model="new").status_code == 200
    twice = fleet.http.post("/admin/models", json=body, headers=ADMIN)
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "model_exists")
    absent = fleet.http.post("/admin/models", json={"model": "/nowhere"}, headers=ADMIN)
    assert absent.status_code >= 400
    assert "/nowhere" in absent.json()["error"]["message"]
    wrong = fleet.http.post("/admin/models/new/dance", headers=ADMIN)
    assert wrong.status_code == 404
    assert admin(fleet, "who", "load").status_code == 404


def engine_pid(server, name="demo"):
    data = server.http.get("/admin/models", headers=ADMIN).json()["data"]
    return next(m["pid"] for m in data if m["id"] == name)


def test_a_killed_engine_is_started_again_and_every_client_was_told(start_toy):
    server = start_toy({"restart_engine": 1, "admin_key": ["boss"]}, TOY_STEP_S="0.02")
    server.wait_ready()
    answers = []
    threads = [
        threading.Thread(
            target=lambda s=stream: answers.append(ask(server, max_tokens=400, stream=s))
        )
        for stream in (True, True, False, False)
    ]
    for thread in threads:
        thread.start()
    until(lambda: 'num_requests_running{model_name="demo"} 4.0' in server.http.get("/metrics").text)
    first = engine_pid(server)
    os.kill(first, signal.SIGKILL)
    for thread in threads:
        thread.join(20)
    assert len(answers) == 4
    assert all('"code":"engine_dead"' in a.text for a in answers)
    until(lambda: server.http.get("/readyz").status_code == 200)
    second = engine_pid(server)
    assert second != first
    assert ask(server).status_code == 200
    restarts = 'engine_restarts_total{model_name="demo",result="serves"} 1.0'
    assert restarts in server.http.get("/metrics").text
    # it dies once more, and that is once too often
    os.kill(second, signal.SIGKILL)
    until(lambda: server.http.get("/readyz").json()["status"] == "dead")
    time.sleep(1.5)
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "dead")
    assert ask(server).status_code == 503
    # the operator may still load it by hand
    assert admin(server, "demo", "load").json()["state"] == "ready"
    assert ask(server).status_code == 200
    assert "started again" in "".join(server.end())


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        (["a", "a"], {}, "named twice"),
        (["a", "b"], {"served_model_name": ["x"]}, "--alias NAME=a"),
        (["a"], {"alias": ["x"]}, "NAME=MODEL"),
        (["a"], {"alias": ["x=b"]}, "models a"),
        (["a", "b"], {"alias": ["x=a", "x=b"]}, "Two models"),
        (["a", "b"], {"alias": ["b=a"]}, "Two models"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(models, options, words):
    configs = [EngineConfig(model=model) for model in models]
    with pytest.raises(ConfigError) as caught:
        names_of(configs, load(ServerConfig, options, environ={}))
    assert words in str(caught.value)


def test_names_are_aliases_first():
    configs = [EngineConfig(model="a"), EngineConfig(model="b")]
    server = load(ServerConfig, {"alias": ["x=b", "y=b"]}, environ={})
    assert names_of(configs, server) == [("a",), ("x", "y", "b")]
    server = load(ServerConfig, {"served_model_name": ["s", "t"]}, environ={})
    assert names_of(configs[:1], server) == [("s", "t")]
