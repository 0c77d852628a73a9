"""The four benchmarks, run as a user runs them, small."""

import argparse
import csv
import json

import pytest

from tokenry.bench.outputs import Outputs
from tokenry.cli import main
from tokenry.errors import TokenryError

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


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        *(("throughput", "--json"), ("latency", "--json"), ("serve", "--json")),
        *(("ramp", "--json"), ("ramp", "--csv"), ("ramp", "--plot")),
    ],
)
def test_file_that_cannot_be_opened_is_known_before_anything_is_measured(
    kind, flag, tmp_path, capsys
):
    path = tmp_path / "absent" / "figures.png"
    # the model is not there either, and would be the error if it were looked for first
    assert main(["bench", kind, "./nowhere", flag, str(path)]) == 2
    text = capsys.readouterr().err
    assert f"{flag} {path}" in text
    assert "No such file or directory" in text


@pytest.mark.parametrize("given", ["json", "csv", "plot"])
def test_full_disk_is_one_error_that_names_flag_and_file(given, tmp_path):
    files = {"json": None, "csv": None, "plot": None, given: "/dev/full"}
    with (
        pytest.raises(TokenryError, match=f"--{given} /dev/full: No space left"),
        Outputs.open(argparse.Namespace(**files)) as outputs,
    ):
        outputs.json({"a": 1})
        outputs.csv([("a", 1)] * 5000)
        outputs.plot(b"x" * 70_000)


def test_figures_of_before_stay_until_there_are_new_ones(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with Outputs.open(argparse.Namespace(json=str(path))) as outputs:
        assert path.read_text() == "old"
        outputs.json({"new": 1})
    assert json.loads(path.read_text()) == {"new": 1}


def test_picture_of_an_unknown_kind_is_refused_at_once(tmp_path, capsys):
    plot, table = str(tmp_path / "ramp.docx"), str(tmp_path / "ramp.csv")
    assert main(["bench", "ramp", "./nowhere", "--plot", plot, "--csv", table]) == 2
    assert "ramp.docx" in capsys.readouterr().err
