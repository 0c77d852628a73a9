"""The soak fails when what it measures is bad."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "soak.py"
FINE = {"unanswered": 0, "leaked": 0.0, "waste": 0.031, "resident": [100, 200, 300, 301, 302, 303]}


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_good_run_has_no_complaints(soak):
    assert soak.complaints(**FINE) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unanswered": 3}, "3 requests are not answered"),
        ({"leaked": 0.01}, "1.0% of the KV"),
        ({"waste": 0.04}, "KV waste is 4.00%"),
        ({"resident": [2**20 * n for n in (100, 200, 300, 305, 310, 320)]}, "from 300 to 320 MiB"),
    ],
)
def test_what_is_bad_is_named(soak, changes, says):
    (complaint,) = soak.complaints(**{**FINE, **changes})
    assert says in complaint
