"""The conformance kit: on a Gaudi where there is one, and on the simulated device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from simdevice import environment

from tokenry.conformance import conformance_tests

test_a_gaudi_conforms = conformance_tests("hpu")

SITE = """
from pathlib import Path
import tokenry_hpu
tokenry_hpu.ROOT = Path({root!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graphs", "lazy", "only"),
    [
        ("none", "0", []),
        ("hpu_graphs", "1", ["C01", "C08", "C09", "C10", "C15"]),
        ("compile", "0", ["C01", "C08", "C09"]),
    ],
)
def test_the_plugin_conforms_on_the_simulated_device(tmp_path, graphs, lazy, only):
    facts = tmp_path / "sys/class/accel/accel0/device"
    facts.mkdir(parents=True)
    (facts / "vendor").write_text("0x1da3\n")
    (facts / "device").write_text("0x1020\n")
    node = tmp_path / "dev/accel/accel0"
    node.parent.mkdir(parents=True)
    node.touch()
    site = tmp_path / "site/sitecustomize.py"
    site.parent.mkdir()
    site.write_text(SITE.format(root=str(tmp_path)))
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tokenry", "conform", "hpu", "--steps", "12"]
    command += ["--backend-option", f"graphs={graphs}", "--json", str(report)]
    command += ["--only", *only] if only else []
    env = environment("hpu", env={"PYTHONPATH": str(site.parent), "PT_HPU_LAZY_MODE": lazy})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert report.exists(), done.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    assert [r for r in results if r["status"] in ("failed", "weak")] == []
    assert sum(r["status"] == "passed" for r in results) >= len(only) or 30
    assert done.returncode == 0
