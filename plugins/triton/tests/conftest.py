"""Kernels of these tests run in Triton's interpreter, right and checked (see lane/)."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported first: before any test module

import pytest
import triton_interpreter
from triton_addresses import TALLY, checked, table

triton_interpreter.install()


@pytest.fixture(autouse=True)
def addresses():
    """Every test's kernels are checked for addresses and writers."""
    with checked() as checker:
        yield checker


def pytest_terminal_summary(terminalreporter):
    """What was interpreted (not where workers ran the tests)."""
    if TALLY:
        terminalreporter.section("Triton's interpreter, against the reference ops")
        terminalreporter.write("\n".join(table()) + "\n")
