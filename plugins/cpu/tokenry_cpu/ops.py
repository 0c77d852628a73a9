"""Kernels of the CPU."""

from __future__ import annotations

from collections.abc import Mapping

from tokenry.backend.base import Op


def cpu_ops() -> Mapping[str, Op]:
    """The kernels by name."""
    return {}
