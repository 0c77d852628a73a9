"""The conformance kit: on a real device where one is, and on the simulated one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from simdevice import environment

from tokenry.conformance import conformance_tests

test_conformance = conformance_tests("neuron")

SITE = """
from pathlib import Path
import tokenry_neuron
tokenry_neuron.ROOT = Path({root!r})
"""


@pytest.mark.slow
def test_the_kit_is_green_on_the_simulated_device(tmp_path):
    (tmp_path / "machine/dev").mkdir(parents=True)
    (tmp_path / "machine/dev/neuron0").touch()
    (tmp_path / "site").mkdir()
    site = SITE.format(root=str(tmp_path / "machine"))  # in every process of the kit
    (tmp_path / "site/sitecustomize.py").write_text(site)
    report = tmp_path / "report.json"
    options = ("hbm_gib=1", f"cache_dir={tmp_path / 'cache'}")
    command = [sys.executable, "-m", "tokenry", "conform", "neuron", "--steps=40"]
    command += [f"--backend-option={option}" for option in options]
    done = subprocess.run(
        [*command, f"--json={report}"],
        env=environment("neuron", env={"PYTHONPATH": str(tmp_path / "site")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.is_file(), done.stderr
    results = json.loads(report.read_text())["results"]
    assert not [(r["id"], r["failures"]) for r in results if r["status"] == "failed"]
    unasked = {r["id"] for r in results if r["status"] == "not asked"}
    assert unasked == {"C07.attention", "C07.ops", "C07.step", "C18.collectives"}
