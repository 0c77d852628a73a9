"""What the probe says of a machine, from a stand-in of NVML and file trees; options; a torch that
cannot.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tokenry_cuda
from tokenry.backend.contract import DeviceRef
from tokenry.backend.discovery import discover, table
from tokenry.errors import BackendError, ConfigError
from tokenry_cuda import probe
from tokenry_cuda.backend import check_torch
from tokenry_triton.gpu.options import GpuOptions

H200 = "NVIDIA H200|GPU-4f2a|90|0"
CUT = "NVIDIA A100|GPU-77aa|80|1"
KEPLER = "Tesla K80|GPU-11bb|37|0"


@pytest.fixture
def look(nvml_folder, tmp_path, monkeypatch):
    """look(cards, environment of the probe, nodes=, **STUB_ variables): what the probe finds."""

    def find(cards="", environ=None, *, nodes=1, library=True, **answers):
        monkeypatch.setenv("STUB_CARDS", cards)
        for key, value in answers.items():
            monkeypatch.setenv(f"STUB_{key}", str(value))
        for i in range(nodes):
            (tmp_path / "dev").mkdir(exist_ok=True)
            (tmp_path / f"dev/nvidia{i}").touch()
        name = "libnvidia-ml.so.1" if library else "libnvidia-ml-missing.so.1"
        return probe.find_device(tmp_path, environ or {}, str(nvml_folder / name))

    return find


def test_a_card_is_named_with_its_driver_and_how_many_there_are(look):
    found = look(f"{H200};{H200.replace('4f2a', '5c3b')}")
    why = "2 visible, sm_90, driver 570.86.15"
    assert found == DeviceRef(backend="cuda", index=0, name="NVIDIA H200", score=100, why=why)


def test_nothing_at_all_is_no_device(look):
    assert look(nodes=0, library=False) is None


def test_a_card_on_the_bus_without_a_driver_is_told(look, tmp_path):
    card = tmp_path / "sys/bus/pci/devices/0000:65:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    found = look(nodes=0, library=False)
    assert found.score == 0
    assert "0000:65:00.0 has no driver; install NVIDIA's driver" in found.why
    (card / "class").write_text("0x040300\n")  # the card's sound device
    assert look(nodes=0, library=False) is None


@pytest.mark.parametrize(
    ("case", "why", "mend"),
    [
        ({"library": False}, "nvidia0 is in /dev, but", "docker run --gpus all"),
        ({"INIT": 9}, "kernel module is not loaded", "modprobe nvidia"),
        ({"INIT": 18}, "different drivers", "reboot"),
        ({"INIT": 4}, "refuses access", "--gpus all"),
        ({"INIT": 999}, "NVML says 999", "nvidia-smi"),
        ({"cards": ""}, "shows no GPU", "--gpus all"),
        ({"CUDA": 11080, "DRIVER": "470.57"}, "driver 470.57 has CUDA 11.8, too old", "update"),
        ({"cards": KEPLER}, "compute capability 3.7 is not supported", "--backend cpu"),
        ({"cards": CUT}, "MIG is on and no slice was chosen", "CUDA_VISIBLE_DEVICES=MIG-"),
        ({"environ": {"CUDA_VISIBLE_DEVICES": ""}}, "every GPU is hidden", "unset CUDA_"),
        ({"environ": {"CUDA_VISIBLE_DEVICES": "3"}}, "hides all 1 GPUs", "unset CUDA_"),
        ({"environ": {"CUDA_VISIBLE_DEVICES": "-1"}}, "hides all 1 GPUs", "unset CUDA_"),
        ({"environ": {"CUDA_VISIBLE_DEVICES": "MIG-1f"}}, "but MIG is off", "unset CUDA_"),
    ],
    ids=lambda value: " ".join(value.split()[:4]) if isinstance(value, str) else "",
)
def test_what_cannot_be_used_says_why_and_how_to_mend_it(look, case, why, mend):
    found = look(**{"cards": H200, **case})
    assert found.score == 0
    assert why in found.why
    assert mend in found.why


def test_a_slice_of_a_card_can_be_used(look):
    found = look(CUT, {"CUDA_VISIBLE_DEVICES": "MIG-9a0f"})
    assert (found.score, found.name) == (100, "NVIDIA A100")
    assert "a MIG slice" in found.why


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (None, "abc"), ("1", "b"), ("2,0", "ca"), ("GPU-b", "b"), ("0,7,1", "a"), ("1,1", "b"),
        ("GPU-c,0", "ca"), ("0, 1", "ab"),
    ],
)  # fmt: skip
def test_the_visible_cards_are_those_of_the_variable_in_its_order(chosen, names):
    cards = tuple(probe.Card(name=n, uuid=f"GPU-{n}", sm=90, mig=False) for n in "abc")
    seen = probe.visible(cards, chosen)
    assert "".join(card.name for card in seen) == names


def test_the_first_visible_card_is_the_one_that_is_judged(look):
    both = f"{KEPLER};{H200}"
    assert look(both).score == 0
    assert look(both, {"CUDA_VISIBLE_DEVICES": "1"}).score == 100


def test_probing_imports_no_torch_and_writes_no_environment(h200):
    code = (
        "import os, sys; before = dict(os.environ); import tokenry_cuda; "
        "found = tokenry_cuda.tokenry_probe(); "
        "print('torch' in sys.modules, dict(os.environ) == before, found.score)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
        env=os.environ | h200,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True", "100"]


CASES = [
    ({"CUDA": 11080, "DRIVER": "470.57"}, "driver 470.57 has CUDA 11.8, too old", "update the"),
    ({"library": "libnone.so"}, "is not to be found: no driver", "install the driver"),
    ({"visible": ""}, "CUDA_VISIBLE_DEVICES is empty: every GPU is hidden", "unset CUDA_VISIBLE"),
    ({"CARDS": CUT}, "MIG is on and no slice was chosen", "CUDA_VISIBLE_DEVICES=MIG-"),
    ({"CARDS": KEPLER}, "compute capability 3.7 is not supported", "--backend cpu"),
]


@pytest.mark.parametrize(("case", "why", "mend"), CASES, ids=[c[1][:24] for c in CASES])
def test_each_reason_is_a_line_of_tokenry_devices(
    nvml_folder, tmp_path, monkeypatch, case, why, mend
):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    library = case.get("library", str(nvml_folder / "libnvidia-ml.so.1"))
    monkeypatch.setattr(tokenry_cuda, "ROOT", tmp_path)
    monkeypatch.setattr(tokenry_cuda, "NVML", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if "visible" in case:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", case["visible"])
    for key, value in {"CARDS": H200, **case}.items():
        monkeypatch.setenv(f"STUB_{key}", str(value))
    line = table(discover("cuda"))
    assert line.count("\n") == 0
    assert line.split()[0] == "cuda"
    assert "no: " in line
    assert why in line
    assert mend in line


def test_devices_prints_the_line(h200):
    done = subprocess.run(
        [sys.executable, "-m", "tokenry", "devices"], capture_output=True, text=True, check=False,
        env=os.environ | h200 | {"STUB_CUDA": "11080", "STUB_DRIVER": "470.57"},
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["cuda"])
    assert "driver 470.57 has CUDA 11.8, too old" in line
    assert "update the driver" in line


def test_opening_is_for_its_own_device_only():
    cpu = DeviceRef(backend="cpu", index=0, name="CPU", score=1)
    assert tokenry_cuda.tokenry_open(cpu, {}, (1, 0)) is None


def test_a_torch_without_cuda_is_named_with_the_one_to_install(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    device = DeviceRef(backend="cuda", index=0, name="NVIDIA H200", score=100)
    with pytest.raises(BackendError, match="for the CPU only") as caught:
        check_torch(device)
    assert "whl/cu" in str(caught.value.mend)


def test_options_are_read_and_default():
    assert GpuOptions.parse("cuda", {}) == GpuOptions(kernels="auto", graphs="capture")
    given = {"kernels": "torch", "graphs": "none", "linear": "fp8", "graph_memory": "512"}
    assert GpuOptions.parse("cuda", given) == GpuOptions(
        kernels="torch", graphs="none", linear="fp8", graph_memory=512
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel": "torch"}, "The cuda backend has no option 'kernel', it has kernels"),
        ({"kernels": "native"}, "one of auto, triton, torch"),
        ({"graphs": "yes"}, "one of capture, none"),
        ({"linear": "int8"}, "one of model, fp8"),
        ({"graph_memory": "-1"}, "not a whole number"),
        ({"graph_memory": "1.5"}, "not a whole number"),
    ],
)
def test_a_wrong_option_is_refused_with_the_mend(options, text):
    with pytest.raises(ConfigError, match=text) as caught:
        GpuOptions.parse("cuda", options)
    assert "--backend-option" in str(caught.value.mend)
