"""The kit as pytest tests: one test per check.

In: a backend's name. Out: a test function that pytest finds under the name it is given. Imports
pytest, torch and the checks only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenry.conformance.check import Check


def conformance_tests(
    backend: str, *, options: Mapping[str, str] | None = None, steps: int = 1000
) -> Callable[..., None]:
    """A pytest function with one test per check of the backend.

    Skipped: what the backend's Caps do not ask for, or where its device is not here. A rule that is
    only good to have warns. options: `--backend-option` of the backend; steps: of C10.
    """
    import tempfile
    import warnings
    from functools import cache
    from pathlib import Path

    import pytest

    from tokenry.conformance.catalog import CHECKS
    from tokenry.conformance.check import run_check
    from tokenry.conformance.kit import Kit
    from tokenry.errors import NoBackend

    @cache
    def kit() -> tuple[Any, Kit]:
        scratch = tempfile.TemporaryDirectory(prefix="conform-")  # goes with the process
        return scratch, Kit(
            backend, options=options or {}, directory=Path(scratch.name), steps=steps
        )

    @pytest.mark.parametrize("check", CHECKS, ids=[one.id for one in CHECKS])
    def test(check: Check) -> None:
        try:
            _, asked = kit()
        except NoBackend as error:
            pytest.skip(f"{backend} is not here: {error}")
        result = run_check(check, asked)
        if result.status == "not asked":
            pytest.skip(result.reason)
        told = f"{check.id}: {check.rule}\n" + "\n".join(result.failures)
        if result.status == "weak":
            warnings.warn(told, stacklevel=1)
        assert result.status != "failed", told

    return test
