"""What a benchmark refuses before it measures, and what it says."""

import json
import re
import subprocess
import sys

import pytest

from tokenry.cli import main


@pytest.fixture(scope="module")
def guarded():
    """Address of a server that serves only the demo, to the key "open"."""
    command = [sys.executable, "-m", "tokenry", "serve", "demo", "--port", "0", "--api-key", "open"]
    limits = ["--max-model-len", "128", "--num-kv-blocks", "64", "--backend", "cpu"]
    process = subprocess.Popen([*command, *limits], stderr=subprocess.PIPE, text=True)
    url = None
    for line in process.stderr:
        if found := re.search(r"listening on (\S+),", line):
            url = found[1]
        if line.startswith("try:"):
            assert "-H 'Authorization: Bearer API_KEY'" in line
        if line.startswith("page:"):
            break
    yield url
    process.terminate()
    process.stderr.read()
    assert process.wait(30) == 0


SERVE = ["--input-len", "8", "--output-len", "2", "--num-prompts", "2"]


def test_model_that_is_not_served_is_refused(guarded, capsys):
    given = ["--url", guarded, "--api-key", "open", *SERVE]
    assert main(["bench", "serve", "nomodel", *given]) == 2
    text = capsys.readouterr().err
    assert "nomodel" in text
    assert "demo" in text


def test_without_a_model_the_figures_name_the_served_one(guarded, tmp_path):
    path = tmp_path / "s.json"
    given = ["--url", guarded, "--api-key", "open", *SERVE, "--json", str(path)]
    assert main(["bench", "serve", *given]) == 0
    figures = json.loads(path.read_text())
    assert (figures["model"], figures["requests"]) == ("demo", 2)


@pytest.mark.parametrize("kind", ["serve", "ramp"])
def test_wrong_key_is_named(guarded, kind, capsys):
    assert main(["bench", kind, "--url", guarded, "--api-key", "shut"]) == 2
    text = capsys.readouterr().err
    assert "API key" in text
    assert "--api-key" in text
    assert "start one" not in text


def test_ramp_writes_only_what_it_was_asked_for(guarded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--url", guarded, "--api-key", "open", "--step", "64", "--output-len", "2"]
    assert main(["bench", "ramp", *given, "--start", "64"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "ramp", *given, "--start", "64", "--csv", "r.csv"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]
    assert f"wrote {tmp_path / 'r.csv'}" in capsys.readouterr().out


def test_plot_that_cannot_be_made_is_refused_before_the_ramp(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    plot = str(tmp_path / "r.png")
    assert main(["bench", "ramp", "./nowhere", "--plot", plot]) == 2
    assert 'pip install "tokenry[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "flag", "value"),
    [
        ("throughput", "--num-prompts", "0"),
        ("throughput", "--input-len", "0"),
        ("throughput", "--output-len", "-1"),
        ("latency", "--rounds", "0"),
        ("latency", "--batch-size", "0"),
        ("serve", "--num-prompts", "-3"),
        ("serve", "--max-concurrency", "0"),
        ("serve", "--burstiness", "0"),
        ("serve", "--request-rate", "-1"),
        ("serve", "--request-rate", "nan"),
        ("ramp", "--step", "0"),
        ("ramp", "--start", "0"),
        ("ramp", "--output-len", "0"),
    ],
)
def test_count_that_measures_nothing_is_refused(kind, flag, value, capsys):
    assert main(["bench", kind, "./nowhere", f"{flag}={value}"]) == 2
    text = capsys.readouterr().err
    assert f"{flag} is {value}" in text
