"""Dynamo backends of the vendors' names: static programs, counted; what a compiler refuses."""

from __future__ import annotations

import pytest
from simdevice import run_on_device

SCRIPT = """
import os
import sys
import torch
import simdevice

device, found = simdevice.current(), {}
name, backend = device.name, sys.argv[1]


def refusal(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def compiled(function, **options):
    options = {"fullgraph": True, "dynamic": False, **options}
    return torch.compile(function, backend=backend, **options)


def step(x, cache, slots):
    cache.index_copy_(0, slots, x * 2)
    return torch.relu(x @ cache.mT).argmax(-1)


def inputs(rows):
    return (torch.ones(rows, 4, device=name), torch.zeros(8, 4, device=name),
            torch.arange(rows).to(name))


program = compiled(step)
x, cache, slots = inputs(2)
with torch.inference_mode():
    out = program(x, cache, slots)
    found["written"] = cache.cpu().sum().item()
    found["result"] = out.cpu().tolist()
    device.reset_counts()
    for _ in range(3):
        program(x, cache, slots)
    counts = device.counts()
    found["again"] = [counts.programs, counts.loose_kernels, counts.host_syncs]
    program(*inputs(3))
    found["other_shape"] = device.counts().programs
    device.strict()
    found["known"] = refusal(lambda: program(*inputs(3)))
    found["new"] = refusal(lambda: program(*inputs(4)))
    device.relax()

    found["refused"] = {
        "dynamic": refusal(lambda: compiled(step, dynamic=True)(*inputs(5))),
        "item": refusal(lambda: compiled(lambda x: x * x.sum().item())(x)),
        "nonzero": refusal(lambda: compiled(lambda x: x.nonzero() + 1)(x)),
    }
    host = compiled(lambda x, y: x + y.to(x.device))
    found["host_input"] = refusal(lambda: host(x, torch.ones(2, 4)))
simdevice.report(found)
"""
CACHE = """
import torch
import simdevice
import torch_neuronx

device = simdevice.current()
with torch.inference_mode():
    program = torch.compile(lambda x: x * 2 + 1, backend="neuron", fullgraph=True, dynamic=False)
    out = program(torch.ones(3, device="neuron"))
    program(torch.ones(4, device="neuron"))
counts = device.counts()
simdevice.report({
    "counts": [counts.programs, counts.cached_programs, counts.compilations],
    "out": out.cpu().nan_to_num(-9).tolist(),
    "metrics": [m.graph_node_count for m in torch_neuronx.get_dynamo_metrics()],
})
"""
BACKENDS = {"hpu": "hpu_backend", "neuron": "neuron"}


@pytest.fixture(scope="module", params=BACKENDS)
def found(request):
    """(device, what the script saw)."""
    run = run_on_device(
        request.param,
        SCRIPT,
        memory=1 << 26,
        args=[BACKENDS[request.param]],
        env={"TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY": "1"},
    )
    return request.param, run.value


def test_a_program_writes_in_place_and_runs_again_without_compiling(found):
    _, got = found
    assert got["written"] == 16.0
    assert got["result"] == [0, 0]
    assert got["again"] == [0, 0, 0]


def test_another_shape_is_another_program_and_refused_when_strict(found):
    _, got = found
    assert got["other_shape"] == 1
    assert got["known"] is None
    assert "NewProgram" in got["new"][1]


def test_what_is_not_static_is_refused(found):
    name, got = found
    for key in ("dynamic", "item", "nonzero"):
        assert f"DynamicShape: {BACKENDS[name]}: " in got["refused"][key][1], key


def test_inputs_on_the_host_are_refused(found):
    name, got = found
    text = "inputs [0] are on the host" if name == "neuron" else "an input of shape (2, 4) is on"
    assert text in got["host_input"][1]


def test_neuron_finds_its_programs_on_disk_and_compiles_without_running(tmp_path):
    env = {"TORCH_NEURONX_NEFF_CACHE_DIR": str(tmp_path)}
    only = env | {"TORCH_NEURONX_COMPILE_ONLY": "1"}
    first = run_on_device("neuron", CACHE, env=only).value
    assert first["counts"] == [2, 0, 2]
    assert first["out"] == [-9.0] * 3
    assert len(list(tmp_path.glob("*.neff"))) == len(first["metrics"]) == 2
    second = run_on_device("neuron", CACHE, env=env).value
    assert second["counts"] == [2, 2, 0]
    assert second["out"] == [3.0] * 3
    flags = env | {"NEURON_CC_FLAGS": "-O1"}
    assert run_on_device("neuron", CACHE, env=flags).value["counts"] == [2, 0, 2]
