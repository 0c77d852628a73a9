"""Who decides whether steps overlap: the user, else the backend."""

from __future__ import annotations

import pytest

from tokenry import assemble
from tokenry.config import EngineConfig

SMALL = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_kv_blocks": 8}


@pytest.mark.parametrize(
    ("backend", "asked", "want"),
    [
        ("cpu", None, False),  # its work is done by the cores that would plan
        ("cpu", True, True),
        ("sim-cuda", None, True),
        ("sim-cuda", False, False),
    ],
)
def test_steps_overlap_as_asked_else_as_the_backend_advises(backend, asked, want):
    config = EngineConfig(model="demo", backend=backend, overlap=asked, **SMALL)
    assembled = assemble.assemble(config)
    try:
        assert assembled.engine.limits.overlap is want
    finally:
        assembled.engine.close()
