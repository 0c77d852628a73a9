"""benchmarks/gpu_steps.py: its arithmetic, and a whole run on the simulated device (whose events
have no time: a clock stands in for them).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from simdevice import run_on_device

TOOL = Path(__file__).parents[3] / "benchmarks/gpu_steps.py"


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("gpu_steps", TOOL)
    module = sys.modules["gpu_steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([], None),
        ([(0, 10)], 1.0),
        ([(0, 4), (6, 10)], 0.8),
        ([(0, 9), (1, 2), (3, 10)], 1.0),
        ([(0, 2), (1, 3), (5, 10)], 0.8),
    ],
)
def test_the_busy_share_is_what_the_spans_cover(tool, spans, share):
    assert tool.union(spans) == share


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ([], [(True, False), (False, False)]),
        (["--deterministic", "both"], [(True, False), (True, True), (False, False)]),
        (["--overlap", "on", "--deterministic", "on"], [(True, True)]),
    ],
)
def test_the_deterministic_mode_is_one_of_a_pair(tool, given, ways):
    assert tool.ways(tool.arguments(["demo", *given])) == ways


class Clock:
    """An event at a time that is told."""

    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        return other.at - self.at

    def synchronize(self):
        return None


def test_periods_and_gaps_are_those_of_the_middle_steps(tool):
    marks = tool.Marks(run=None, new_event=None)
    marks.begins = [Clock(10 * i) for i in range(20)]
    marks.ends = [Clock(10 * i + 9 + (100 if i == 0 else 0)) for i in range(20)]
    periods, gaps = marks.times()
    assert periods == [10] * 15  # of 20 steps: not the first three, not the last two
    assert gaps == [1] * 15


@pytest.mark.slow
def test_it_runs_to_its_table(h200, tmp_path):
    script = """
import sys, time
from pathlib import Path
import torch, simdevice

sys.path.insert(0, str(Path(sys.argv[1]).parent))
import gpu_steps

class Clock:
    def __init__(self, enable_timing=False): pass
    def record(self, stream=None): self.at = time.perf_counter()
    def synchronize(self): torch.cuda.synchronize()
    def elapsed_time(self, other): return 1000 * (other.at - self.at)

own = torch.cuda.Event
torch.cuda.Event = lambda enable_timing=False: Clock() if enable_timing else own()
gpu_steps.main(["demo", "--dtype", "float32", "--batches", "1", "4", "--prompt", "8", "--output",
                "12", "--backend-option", "kernels=torch", "--limit", "num_kv_blocks=20",
                "--json", sys.argv[2]])
"""
    report = tmp_path / "report.json"
    run = run_on_device("cuda", script, env=h200, args=[str(TOOL), str(report)])
    rows = json.loads(report.read_text())["rows"]
    assert [(r["batch"], r["overlap"]) for r in rows] == [
        (1, True), (4, True), (1, False), (4, False),
    ]  # fmt: skip
    assert all(r["steps"] >= 8 and 0 <= r["gap"] <= r["period"] for r in rows)
    assert run.stdout.count("tokens/s") == 4
