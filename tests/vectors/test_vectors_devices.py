"""Encoders, and a decoder that embeds, on the simulated devices of the static plugins: the CPU's
vectors, and nothing compiled or read in service.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from simdevice import run_on_device

pytestmark = pytest.mark.slow

SCRIPT = """
import importlib, json, sys
from pathlib import Path

import simdevice
import torch
from tokenry import LLM

job = json.loads(sys.argv[1])
importlib.import_module("tokenry_" + job["backend"]).ROOT = Path(job["root"])
device, found = simdevice.current(), []
for model in job["models"]:
    device.relax()
    with LLM(model, backend=job["backend"], backend_option=job["options"], progress=False,
             dtype="float32", max_num_seqs=2, max_num_batched_tokens=128, max_programs=6) as llm:
        runner = llm._assembled.runner
        made = runner.compile_count()
        first = llm.encode(job["texts"], use_tqdm=False)  # copies of the inputs may be compiled
        device.strict()
        outputs = llm.encode(job["texts"], use_tqdm=False)
        assert [o.outputs for o in outputs] == [o.outputs for o in first]
        found.append({
            "vectors": [o.outputs.data for o in outputs],
            "recompiles": runner.compile_count() - made,
            "programs": llm.get_metrics().programs,
        })
simdevice.report(found)
"""
WAYS = {
    "hpu-graphs": ("hpu", {"PT_HPU_LAZY_MODE": "1"}, ["graphs=hpu_graphs"]),
    "neuron": ("neuron", {}, ["hbm_gib=1"]),
}


def machine(root: Path, backend: str) -> Path:
    """A file tree with the device in it."""
    if backend == "hpu":
        (root / "dev/accel").mkdir(parents=True)
        (root / "dev/accel/accel0").touch()
        facts = root / "sys/class/accel/accel0/device"
        facts.mkdir(parents=True)
        (facts / "vendor").write_text("0x1da3\n")
        (facts / "device").write_text("0x1020\n")
    else:
        (root / "dev").mkdir()
        (root / "dev/neuron0").touch()
        facts = root / "sys/devices/virtual/neuron_device/neuron0/info/architecture"
        facts.mkdir(parents=True)
        (facts / "arch_type").write_text("NCv3\n")
    return root


@pytest.mark.parametrize("way", WAYS)
def test_the_vectors_are_those_of_the_cpu(
    bert: Any, qwen: Any, open_llm: Any, words: Any, tmp_path: Path, way: str
) -> None:
    backend, env, options = WAYS[way]
    if backend == "neuron":
        options = [*options, f"cache_dir={tmp_path / 'cache'}"]
    models = [str(bert[0]), *([str(qwen[0])] if way == "hpu-graphs" else [])]
    texts = [words(1, 2, 3), words(*range(7, 37)), words(5)]
    job = {"root": str(machine(tmp_path, backend)), "backend": backend, "models": models,
           "texts": texts, "options": options}  # fmt: skip
    found = run_on_device(backend, SCRIPT, args=[json.dumps(job)], env=env).value
    for path, got in zip(models, found, strict=True):
        want = open_llm(Path(path)).encode(texts, use_tqdm=False)
        assert got["recompiles"] == 0 and got["programs"] > 0
        for vector, one in zip(got["vectors"], want, strict=True):
            assert vector == pytest.approx(one.outputs.data, abs=1e-5)
