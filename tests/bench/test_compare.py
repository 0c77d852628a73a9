"""`tokenry bench compare` against two real servers, and its arithmetic."""

import json
import re
import subprocess
import sys
import threading

import pytest

from tokenry.bench.compare import Round, ratio, round_of, values
from tokenry.bench.figures import Timeline
from tokenry.cli import main


@pytest.fixture(scope="module")
def urls():
    """Two servers; one of them lets in who has a key."""
    running, found = [], []
    for more in ([], ["--api-key", "k2", "--served-model-name", "second"]):
        command = [sys.executable, "-m", "tokenry", "serve", "demo", "--backend", "cpu"]
        command += ["--port", "0", "--num-kv-blocks", "64", *more]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        running.append(process)
        for line in process.stderr:
            if at := re.search(r"listening on (\S+),", line):
                found.append(at[1])
            if line.startswith("page:"):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
    yield found
    for process in running:
        process.terminate()
        process.wait(20)


TINY = ["--num-prompts", "3", "--input-len", "8", "--output-len", "4", "--rounds", "3"]


@pytest.mark.slow
def test_two_servers_take_turns_and_all_rounds_are_told(urls, tmp_path, capsys):
    path = tmp_path / "c.json"
    command = ["bench", "compare", *urls, "--api-keys", "", "k2", "--json", str(path), *TINY]
    assert main(command) == 0
    told = json.loads(path.read_text())
    assert [s["model"] for s in told["servers"]] == ["demo", "second"]
    for server in told["servers"]:
        assert [r["output_tokens"] for r in server["rounds"]] == [12, 12, 12]
        assert all(r["failures"] == 0 and r["ttft_ms"] > 0 for r in server["rounds"])
    a, b = ([r["tpot_ms"] for r in s["rounds"]] for s in told["servers"])
    assert told["ratios_b_to_a"]["tpot_ms"] == pytest.approx(sorted(b)[1] / sorted(a)[1])
    out = capsys.readouterr().out
    assert len(re.findall(r"^\d +[AB] ", out, re.M)) == 6
    assert "B / A" in out
    # a key that is wrong, a model that is not served, a prompt that none takes
    assert main(["bench", "compare", *urls, *TINY]) == 2
    assert "refuses the API key" in capsys.readouterr().err
    keys = ["--api-keys", "", "k2"]
    assert main(["bench", "compare", *urls, *keys, "--models", "demo", "third", *TINY]) == 2
    assert "it serves second" in capsys.readouterr().err
    assert main(["bench", "compare", *urls, *keys, *TINY, "--input-len", "5000"]) != 0
    assert "answered none of 3 requests: 400 context_length_exceeded" in capsys.readouterr().err


def test_a_rounds_figures_are_medians_of_those_that_were_answered():
    done = [
        Timeline(sent_s=0.0, token_s=(0.1 * k, 0.1 * k + 0.05, 0.1 * k + 0.1), num_prompt=4)
        for k in (1, 2, 6)
    ]
    failed = Timeline(sent_s=0.0, token_s=(), num_prompt=4, error="400")
    found = round_of([*done, failed], 3.0)
    assert (found.output_tokens, found.failures) == (9, 1)
    assert found.output_tokens_per_s == pytest.approx(3.0)
    assert found.ttft_ms == pytest.approx(200)
    assert found.tpot_ms == pytest.approx(50)
    assert found.e2el_ms == pytest.approx(300)


def test_ratios_are_of_medians_and_absent_where_a_figure_is():
    def one(ttft, tpot=None):
        return Round(
            output_tokens_per_s=1.0, ttft_ms=ttft, tpot_ms=tpot, e2el_ms=1.0, output_tokens=1,
            failures=0,
        )  # fmt: skip

    a, b = [one(10.0), one(1000.0), one(20.0)], [one(40.0), one(1.0), one(60.0)]
    assert ratio(values(a, "ttft_ms"), values(b, "ttft_ms")) == pytest.approx(2.0)
    assert ratio(values(a, "tpot_ms"), values(b, "tpot_ms")) is None
    assert ratio([0.0], [1.0]) is None


def test_a_flag_that_measures_nothing_is_refused(capsys):
    assert main(["bench", "compare", "http://a", "http://b", "--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err
