"""How the device comes into a process: by the environment, by install, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import simdevice
from simdevice import environment, run_on_device
from simdevice.build import library
from simdevice.processes import folders

CUDA = """
import torch
import simdevice

found = {}
torch.manual_seed(3)
static = torch.zeros(2, 4).cuda()
weight = torch.randn(4, 4, device="cuda")
stream = torch.cuda.Stream()
graph = torch.cuda.CUDAGraph()
with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
    found["capturing"] = torch.cuda.is_current_stream_capturing()
    out = torch.relu(static @ weight)
x = torch.randn(2, 4)
static.copy_(x)
torch.cuda.set_sync_debug_mode("error")
graph.replay()
torch.ones(2).to("cuda", non_blocking=True)
found["uploads"] = []
for upload in (lambda: torch.tensor([1, 0], device="cuda"), lambda: x.cuda(), lambda: out[[1, 0]]):
    try:
        upload()
    except RuntimeError as error:
        found["uploads"].append(str(error))
try:
    out.cpu()
except RuntimeError as error:
    found["sync"] = str(error)
torch.cuda.set_sync_debug_mode("default")
found["replayed"] = torch.allclose(out.cpu(), torch.relu(x @ weight.cpu()), atol=1e-6)
stats = torch.cuda.memory_stats()
found["memory"] = stats["allocated_bytes.all.current"] == torch.cuda.memory_allocated()
found["card"] = [torch.cuda.is_available(), torch.cuda.get_device_capability(), torch.version.hip,
                 torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]]
simdevice.report(found)
"""


def python(code, env=None):
    """Runs code in a fresh Python; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_children_of_the_environment_have_the_device_after_importing_torch():
    code = "import torch; print(torch.neuron.mem_get_info()[1], torch.ones(2, device='neuron'))"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    output = python(parent, environment("neuron", memory=1 << 20))
    assert output.startswith("1048576 tensor([1., 1.], device='neuron:0')")


@pytest.mark.parametrize("torch_first", [False, True], ids=["before torch", "after torch"])
def test_install_puts_the_device_into_this_process_once(torch_first):
    code = f"""
import sys
sys.path.insert(0, {folders("hpu")[0]!r})
{"import torch" if torch_first else ""}
import simdevice
try:
    simdevice.current()
except simdevice.NoDevice as error:
    print(error)
device = simdevice.install("hpu", memory=1 << 20)
import torch
print(device is simdevice.install("hpu") is simdevice.current(), torch.ones(1).pin_memory().shape)
simdevice.install("acme")
"""
    output = python(code)
    assert "this process has no simulated device; mend: simdevice.install(name)" in output
    assert "True torch.Size([1])" in output
    assert "Refused: this process already has the simulated device hpu" in output


def test_a_script_that_fails_is_an_assertion_with_its_output():
    with pytest.raises(AssertionError, match=r"(?s)ended with 1.*seen.*ZeroDivisionError"):
        run_on_device("acme", "print('seen'); 1 / 0")
    run = run_on_device("acme", "import sys; print(sys.argv[1]); sys.exit(3)", check=False,
                        args=["given"])  # fmt: skip
    assert (run.returncode, run.stdout, run.value) == (3, "given\n", None)


def test_a_name_that_is_no_identifier_is_refused():
    with pytest.raises(ValueError, match="not 'my-device'"):
        environment("my-device")


def test_importing_the_helper_loads_no_torch():
    path = folders("hpu")[0]
    code = f"import sys; sys.path[:0] = [{path!r}]; import simdevice; print('torch' in sys.modules)"
    assert python(code) == "False\n"


def test_the_library_is_built_once():
    first = library()
    made = first.stat().st_mtime_ns
    assert library() == first
    assert first.stat().st_mtime_ns == made


def test_promotion_can_be_allowed():
    script = """
import torch, simdevice
x = torch.ones(2, device="acme")
simdevice.report(str((x + x.bfloat16()).dtype))
"""
    run = run_on_device("acme", script, env={"SIMDEVICE_DTYPES": "promote"})
    assert run.value == "torch.float32"


@pytest.mark.parametrize(
    ("card", "facts"),
    [("H200", [True, [9, 0], None, ""]), ("MI300X", [True, [9, 4], "6.4", "gfx942"])],
)
def test_cuda_graphs_and_facts_of_a_card(card, facts):
    found = run_on_device("cuda", CUDA, env={"SIMDEVICE_GPU": card}).value
    assert found["card"] == facts
    assert found["capturing"] is True
    assert found["replayed"] is True
    assert found["memory"] is True
    assert "[simdevice:host-sync] a blocking copy to the host" in found["sync"]
    assert len(found["uploads"]) == 3
    assert all("host-sync] a blocking copy to the device" in text for text in found["uploads"])


def test_refusals_share_a_type():
    kinds = [simdevice.HostSync, simdevice.NewProgram, simdevice.NotCapturable]
    assert all(issubclass(kind, simdevice.Refused) for kind in kinds)
    assert issubclass(simdevice.Refused, RuntimeError)
