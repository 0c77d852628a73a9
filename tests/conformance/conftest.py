"""Mutants as installed distributions: real entry points in a directory on sys.path."""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)

import mutant_doors  # noqa: E402  # after the path
import mutants  # noqa: E402


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Names of the mutants, found by discovery like any other backend."""
    where = tmp_path_factory.mktemp("site")
    info = where / "tokenry_mutants-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenry-mutants\nVersion: 0.1\n")
    names = [*mutants.MUTANTS, *mutant_doors.SPECIAL]
    lines = [f"{name} = mutant_doors:door_{name.replace('-', '_')}" for name in names]
    (info / "entry_points.txt").write_text("[tokenry.backends]\n" + "\n".join(lines) + "\n")
    sys.path.insert(0, str(where))
    yield names
    sys.path.remove(str(where))


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """What a mutant does to this process ends with its test."""
    from tokenry.backend.reference import Linear

    kept = dict(os.environ)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(torch.nn.functional, "silu", torch.nn.functional.silu)
    monkeypatch.setattr(Linear, "__call__", Linear.__call__)
    yield
    torch.set_grad_enabled(True)
    os.environ.clear()
    os.environ.update(kept)
