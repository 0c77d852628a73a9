"""`tokenry doctor`: one root cause and its mend, also after a start that failed."""

import json
import os
import subprocess
import sys

import pytest

from tokenry import doctor
from tokenry.backend import discovery
from tokenry.backend.discovery import Probe
from tokenry.errors import ModelLoadError


@pytest.fixture
def tokenry(tmp_path):
    """The command line in a process of its own; its notes go to a directory of the test's."""

    def run(*arguments, **environ):
        return subprocess.run(
            [sys.executable, "-m", "tokenry", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", **environ},
        )

    return run


def test_a_failed_start_is_told_with_its_cause_and_mend_but_without_its_keys(tokenry, tmp_path):
    before = tokenry("doctor")
    assert before.returncode == 0, before.stdout + before.stderr
    assert "No failed start is noted." in before.stdout
    assert "backend cpu" in before.stdout
    assert "A start should succeed here." in before.stdout
    key = ("--api-key", "very-secret", "--admin-key=more-secret")
    failed = tokenry("serve", str(tmp_path / "no-model"), "--port", "0", *key)
    assert failed.returncode == 1
    after = tokenry("doctor")
    assert "Last failed start" in after.stdout
    assert "no-model" in after.stdout
    assert "mend" in after.stdout
    assert "secret" not in after.stdout
    assert "secret" not in next(tmp_path.rglob("last_failed_start.json")).read_text()
    data = json.loads(tokenry("doctor", "--json", "--forget").stdout)
    assert data["last_failed_start"]["causes"][-1].count("no-model")
    assert {f["name"] for f in data["findings"]} >= {"device", "memory", "backend cpu"}
    assert "No failed start is noted." in tokenry("doctor").stdout


def test_a_variable_that_is_none_is_the_root_cause(tokenry):
    done = tokenry("doctor", TOKENRY_MODLE="demo")
    assert done.returncode == 1
    assert "A start fails here: environment" in done.stdout
    assert "TOKENRY_MODEL" in done.stdout


def test_the_root_of_a_chain_of_causes_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    try:
        try:
            raise OSError("disk on fire")
        except OSError as error:
            raise ModelLoadError("The weights cannot be read.", mend="water") from error
    except ModelLoadError as error:
        doctor.remember(["tokenry", "serve", "x"], error)
    failed = doctor.last_failed_start()
    assert failed.causes == ["The weights cannot be read.", "OSError: disk on fire"]
    text = "\n".join(doctor._failure(failed))
    assert "root cause  OSError: disk on fire" in text
    assert "mend        water" in text


def test_a_machine_where_nothing_can_run_is_told_why_each_backend_was_refused(monkeypatch):
    probes = [
        Probe(backend="cpu", version="1", state="broken", reason="no library", mend="reinstall"),
        Probe(backend="acme", version="1", state="unusable", reason="driver 3 is older than 5"),
    ]
    monkeypatch.setattr(discovery, "discover", lambda: probes)
    findings = {f.name: f for f in doctor._backends()}
    assert findings["device"].state == "bad"
    assert findings["backend cpu"].mend == "reinstall"
    assert "driver 3 is older than 5" in findings["backend acme"].text
    verdict = doctor._verdict([f for f in findings.values() if f.state == "bad"])
    assert verdict[0].startswith("A start fails here: device")


def test_a_note_that_cannot_be_written_or_read_is_no_second_failure(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    doctor.remember(["tokenry"], ValueError("x"))
    assert doctor.last_failed_start() is None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "tokenry").mkdir()
    doctor.state_file().write_text("{")
    assert doctor.last_failed_start() is None
