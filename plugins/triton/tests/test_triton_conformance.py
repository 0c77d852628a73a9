"""The conformance kit's checks of ops, on kernels interpreted on the host."""

from __future__ import annotations

import pytest
from triton_host import HostBackend

from tokenry.conformance import attention, ops, sampling
from tokenry.conformance.check import run_check

CHECKS = {one.id: one for one in (*ops.CHECKS, *sampling.CHECKS, *attention.CHECKS)}
LONG = {"C03.window", "C03.sample"}
"""Half a minute and more in the interpreter; the other files try the same with fewer cases."""


class Kit:
    """What a check of ops needs of the kit: a deterministic backend with one dtype."""

    dtype = "bfloat16"

    def __init__(self):
        self.caps = self.open().caps

    def open(self):
        """A fresh backend."""
        return HostBackend(dtypes=(self.dtype,), deterministic="true")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CHECKS.keys() - LONG))
def test_ops_conform(name):
    result = run_check(CHECKS[name], Kit())
    assert result.failures == ()
    assert result.status == "passed", result.reason
