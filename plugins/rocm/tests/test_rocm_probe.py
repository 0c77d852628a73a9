"""What the probe says of a machine, from file trees; a torch that cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tokenry_rocm
from tokenry.backend.contract import DeviceRef
from tokenry.backend.discovery import discover, table
from tokenry.errors import BackendError
from tokenry_rocm import probe
from tokenry_rocm.backend import open_device

MI300 = 90402


@pytest.fixture
def machine(tmp_path):
    """machine(gfx_target_version of each GPU): a tree with a CPU's node before them."""

    def build(*versions):
        for i, version in enumerate((None, *versions)):
            node = tmp_path / probe.NODES / str(i)
            node.mkdir(parents=True)
            simds = 0 if version is None else 1216
            text = f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version or 0}\n"
            (node / "properties").write_text(text)
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev/kfd").touch()
        return tmp_path

    return build


def test_no_node_is_no_device(tmp_path):
    assert probe.find_device(tmp_path, {}) is None


@pytest.mark.parametrize("kind", ["0x030000", "0x038000", "0x120000"])
@pytest.mark.parametrize(
    ("module", "mend"), [(False, "modprobe amdgpu"), (True, "docker run --device=/dev/kfd")]
)
def test_a_card_on_the_bus_without_the_node_is_told(tmp_path, kind, module, mend):
    card = tmp_path / "sys/bus/pci/devices/0000:c1:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1002\n")
    (card / "class").write_text(f"{kind}\n")
    if module:
        (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    found = probe.find_device(tmp_path, {})
    assert found.score == 0
    assert "0000:c1:00.0 has no /dev/kfd" in found.why
    assert mend in found.why
    (card / "class").write_text("0x060000\n")  # a bridge of the same maker
    assert probe.find_device(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("version", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110000, "gfx1100"),
     (120001, "gfx1201"), (90012, "gfx90c")],
)  # fmt: skip
def test_the_driver_s_number_is_the_compiler_s_name(version, name):
    assert probe.gfx(version) == name


def test_gpus_are_named_and_counted(machine):
    found = probe.find_device(machine(*[MI300] * 8), {})
    why = "8 visible, gfx942"
    assert found == DeviceRef(
        backend="rocm", index=0, name="AMD Instinct MI300", score=100, why=why
    )


def test_nodes_are_in_the_order_of_their_numbers(machine):
    root = machine(*[MI300] * 9, 90010)
    assert probe.architectures(root)[-1] == "gfx90a"


@pytest.mark.parametrize(
    ("versions", "environ", "why", "mend"),
    [
        ((), {}, "no GPU in its topology", "--device=/dev/kfd"),
        ((90000,), {}, "gfx900 is not supported", "--backend cpu"),
        ((MI300,), {"HIP_VISIBLE_DEVICES": ""}, "hides all GPUs", "unset HIP_VISIBLE_DEVICES"),
        ((MI300,), {"ROCR_VISIBLE_DEVICES": "4"}, "=4 hides all", "unset ROCR_VISIBLE_DEVICES"),
        ((MI300,), {"CUDA_VISIBLE_DEVICES": "-1"}, "=-1 hides", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cannot_be_used_says_why_and_how_to_mend_it(machine, versions, environ, why, mend):
    found = probe.find_device(machine(*versions), environ)
    assert found.score == 0
    assert why in found.why
    assert mend in found.why


def test_a_node_without_the_right_to_use_it_is_told(machine, monkeypatch):
    root = machine(MI300)
    monkeypatch.setattr(os, "access", lambda path, mode: path != root / "dev/kfd")
    found = probe.find_device(root, {})
    assert (found.score, "render,video" in found.why) == (0, True)


def test_each_reason_is_a_line_of_tokenry_devices(machine, monkeypatch):
    """No node, no right to it, hidden, not supported."""
    root = machine(90000)
    monkeypatch.setattr(tokenry_rocm, "ROOT", root)
    lines = [_line()]
    (root / probe.NODES / "1/properties").write_text(f"simd_count 9\ngfx_target_version {MI300}\n")
    assert "score 100" in _line()
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    lines.append(_line())
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != root / "dev/kfd")
        lines.append(_line())
    (root / "dev/kfd").unlink()
    lines.append(_line())
    told = [
        "gfx900 is not supported", "hides all GPUs; unset HIP_VISIBLE_DEVICES",
        "no right to use /dev/kfd; sudo usermod -aG render,video", "its device is not here",
    ]  # fmt: skip
    assert [text in line for text, line in zip(told, lines, strict=True)] == [True] * 4, lines


def _line():
    """What `tokenry devices` prints of the backend."""
    text = table(discover("rocm"))
    assert text.count("\n") == 0
    return text


def test_variables_choose_one_after_the_other(machine):
    root = machine(MI300, 90010, MI300)
    chosen = {"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}
    assert probe.find_device(root, chosen).why == "1 visible, gfx942"
    assert probe.find_device(root, {"HIP_VISIBLE_DEVICES": "1"}).why == "1 visible, gfx90a"
    assert probe.find_device(root, {"ROCR_VISIBLE_DEVICES": "GPU-1f2e"}).why == "1 visible, gfx942"


def test_probing_imports_no_torch_and_writes_no_environment():
    code = (
        "import os, sys; before = dict(os.environ); import tokenry_rocm; "
        "tokenry_rocm.tokenry_probe(); "
        "print('torch' in sys.modules, dict(os.environ) == before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True"]


def test_opening_is_for_its_own_device_only():
    cpu = DeviceRef(backend="cpu", index=0, name="CPU", score=1)
    assert tokenry_rocm.tokenry_open(cpu, {}, (1, 0)) is None


def test_a_torch_that_is_not_for_rocm_is_named_with_the_one_to_install(monkeypatch):
    monkeypatch.setattr("torch.version.hip", None)
    device = DeviceRef(backend="rocm", index=0, name="AMD Instinct MI300", score=100)
    with pytest.raises(BackendError, match="is not for ROCm") as caught:
        open_device(device, {})
    assert "whl/rocm" in str(caught.value.mend)


def test_the_plugin_does_not_know_the_other_vendor_s():
    code = (
        "import sys; import tokenry_rocm.backend; "
        "print([m for m in sys.modules if m.startswith('tokenry_cuda')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
