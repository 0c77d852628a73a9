"""benchmarks/gpu_kernels.py, interpreted on the host, with a clock that always says a millisecond:
its arithmetic, and that it is sound when a GPU comes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[3] / "benchmarks/gpu_kernels.py"


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("gpu_kernels", TOOL)
    module = sys.modules["gpu_kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rates_and_shares_are_those_of_the_shapes(tool, capsys):
    calls = []
    bench = tool.Bench(
        device="cpu", timer=lambda call: calls.append(call()) or 1.0, sizes=(4, 2, 16),
        dtype=torch.float32,
    )  # fmt: skip
    peak, rows = tool.measure(bench, "sm_90", small=True, tune=True)
    assert peak.copy == pytest.approx(2 * 2**20 / 1e6)
    by = {(r.what, r.who): r for r in rows}
    assert len(by) == len(rows) == 10
    for who in ("table", "tuned"):
        assert by["decode 2 x 40", who].rate == pytest.approx(2 * 2 * 40 * 2 * 16 * 4 / 1e6)
        assert by["prefill 20", who].rate == pytest.approx(4 * 4 * 16 * (20 * 21 / 2) / 1e9)
        assert by["linear int4 16 x 32 x 64", who].rate == pytest.approx(
            (32 * 32 + 32 * 2 * 4) / 1e6
        )
        assert by["decode 2 x 40", who].share == by["decode 2 x 40", who].rate / peak.copy
    assert len(list(tool.table(peak, rows))) == 12
    assert '"linear int8 16x32x64 torch.float32"' in capsys.readouterr().out
