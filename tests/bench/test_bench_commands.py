"""The four benchmarks, run as a user runs them, small."""

import csv
import json

import pytest

from tokenry.cli import main

SMALL = ["--max-model-len", "256", "--num-kv-blocks", "64", "--backend", "cpu"]


def test_throughput_and_latency_count_what_they_served(tmp_path, capsys):
    figures = tmp_path / "t.json"
    common = ["demo", "--input-len", "12", "--output-len", "4", *SMALL]
    assert main(["bench", "throughput", *common, "--num-prompts", "5", "--json", str(figures)]) == 0
    data = json.loads(figures.read_text())
    assert data["output_tokens_per_s"] * data["seconds"] == pytest.approx(20)
    assert data["input_tokens_per_s"] * data["seconds"] == pytest.approx(60)
    assert main(["bench", "latency", *common, "--rounds", "2"]) == 0
    assert "p99_s" in capsys.readouterr().out


def test_ramp_climbs_until_the_context_ends_and_the_server_lives_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRY_MAX_MODEL_LEN", "256")
    table, plot = tmp_path / "r.csv", tmp_path / "r.png"
    command = ["bench", "ramp", "demo", "--start", "64", "--step", "96", "--output-len", "4"]
    assert main([*command, "--csv", str(table), "--plot", str(plot)]) == 0
    rows = list(csv.reader(table.open()))
    assert [row[:3] for row in rows[1:]] == [["64", "4", "68"], ["160", "4", "164"]]
    out = capsys.readouterr().out
    assert "ended by: 400 context_length_exceeded" in out
    assert "the server lives on" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_serve_reports_a_server_that_is_not_there(capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--num-prompts", "1"]) == 2
    assert "does not serve models" in capsys.readouterr().err
