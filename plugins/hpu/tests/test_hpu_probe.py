"""What the probe says of a machine, from file trees; options; what a missing package gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tokenry_hpu
from tokenry.backend.contract import DeviceRef
from tokenry.errors import BackendError, ConfigError
from tokenry_hpu import probe
from tokenry_hpu.backend import HpuOptions
from tokenry_hpu.vendor import LAZY, RECIPES, find, load


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A tree with accel nodes: machine(pci device id, vendor id, count, what hl-smi prints)."""

    def build(device="0x1020", vendor="0x1da3", count=1, smi=None, installed=True):
        for i in range(count):
            node = tmp_path / f"dev/accel/accel{i}"
            node.parent.mkdir(parents=True, exist_ok=True)
            node.touch()
            facts = tmp_path / f"sys/class/accel/accel{i}/device"
            facts.mkdir(parents=True)
            (facts / "vendor").write_text(f"{vendor}\n")
            (facts / "device").write_text(f"{device}\n")
        if smi is not None:
            tool = tmp_path / "usr/bin/hl-smi"
            tool.parent.mkdir(parents=True)
            tool.write_text(f"#!/bin/sh\necho '{smi}'\n")
            tool.chmod(0o755)
        monkeypatch.setattr(probe, "find_spec", lambda name: object() if installed else None)
        return tmp_path

    return build


def test_no_node_is_no_device(tmp_path):
    assert probe.find_device(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("device", "name"),
    [("0x1020", "Gaudi 2"), ("0x1021", "Gaudi 2"), ("0x1060", "Gaudi 3"), ("0x1063", "Gaudi 3")],
)
def test_generations_are_told_apart_by_pci_id(machine, device, name):
    found = probe.find_device(machine(device, count=8), {})
    assert found == DeviceRef(backend="hpu", index=0, name=name, score=100, why="8 visible")


@pytest.mark.parametrize(("smi", "name"), [("HL-225", "Gaudi 2"), ("HL-325L", "Gaudi 3")])
def test_an_unknown_id_is_asked_of_hl_smi(machine, smi, name):
    assert probe.find_device(machine("0xff0d", smi=smi), {}).name == name


def test_without_any_sign_the_generation_is_unknown(machine):
    assert probe.find_device(machine("0xff0d"), {}).name == "Gaudi (unknown)"


def test_another_vendors_accel_node_is_not_ours(machine):
    assert probe.find_device(machine("0x7d1d", vendor="0x8086"), {}) is None


def test_visible_modules_are_counted_and_none_is_unusable(machine):
    root = machine(count=8)
    assert probe.find_device(root, {probe.VISIBLE: "0,3,4"}).why == "3 visible"
    found = probe.find_device(root, {probe.VISIBLE: ""})
    assert found.score == 0
    assert "no module is visible" in found.why


def test_a_first_gaudi_is_refused_with_the_reason(machine):
    found = probe.find_device(machine("0x1010"), {})
    assert (found.score, found.name) == (0, "Gaudi")
    assert "not supported" in found.why


def test_a_missing_package_is_a_reason_that_says_where_it_is(machine):
    found = probe.find_device(machine(installed=False), {})
    assert found.score == 0
    assert "not on PyPI" in found.why
    assert "vault.habana.ai" in found.why


def test_probing_imports_no_torch_and_writes_no_environment():
    code = (
        "import os, sys; before = dict(os.environ); import tokenry_hpu; "
        "tokenry_hpu.tokenry_probe(); "
        "print('torch' in sys.modules, dict(os.environ) == before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True"]


def test_opening_is_for_its_own_device_only():
    cpu = DeviceRef(backend="cpu", index=0, name="CPU", score=1)
    assert tokenry_hpu.tokenry_open(cpu, {}, (1, 0)) is None


def test_options_are_read_and_default():
    assert HpuOptions.parse({}) == HpuOptions(graphs="compile", graph_memory_fraction=0.1)
    given = {"graphs": "hpu_graphs", "graph_memory_fraction": "0.8", "linear": "fp8"}
    assert HpuOptions.parse(given) == HpuOptions(
        graphs="hpu_graphs", graph_memory_fraction=0.8, linear="fp8"
    )
    assert HpuOptions.parse({"graphs": "none"}).graph_memory_fraction == 0.0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"graph": "compile"}, "no option 'graph', it has graphs"),
        ({"graphs": "cuda"}, "one of compile, hpu_graphs, none"),
        ({"graph_memory_fraction": "1"}, "below 1"),
        ({"graph_memory_fraction": "nan"}, "below 1"),
        ({"graph_memory_fraction": "much"}, "not a number"),
        ({"linear": "int8"}, "one of model, fp8"),
    ],
)
def test_a_wrong_option_is_refused_with_the_mend(options, text):
    with pytest.raises(ConfigError, match=text) as caught:
        HpuOptions.parse(options)
    assert caught.value.mend is not None
    assert "--backend-option" in caught.value.mend


def test_the_mode_is_set_before_the_vendor_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "habana_frameworks", None)
    environ: dict[str, str] = {}
    with pytest.raises(BackendError, match=r"There is no habana_frameworks.*") as caught:
        load(environ, lazy=True)
    assert environ[LAZY] == "1"
    assert "vault.habana.ai" in str(caught.value)
    environ.clear()
    with pytest.raises(BackendError):
        load(environ, lazy=False, recipes="/var/recipes")
    assert environ == {LAZY: "0", RECIPES: "/var/recipes,false,16384"}


@pytest.mark.parametrize(
    ("visible", "module", "then"), [(None, 3, "3"), ("all", 2, "2"), ("4,6", 1, "6"), ("4", 0, "4")]
)
def test_the_module_chosen_is_among_the_visible_ones(monkeypatch, visible, module, then):
    monkeypatch.setitem(sys.modules, "habana_frameworks", None)
    environ = {} if visible is None else {probe.VISIBLE: visible}
    with pytest.raises(BackendError):
        load(environ, lazy=False, module=module)
    assert environ[probe.VISIBLE] == then


def test_an_environment_that_says_otherwise_is_not_overruled():
    with pytest.raises(ConfigError, match="PT_HPU_LAZY_MODE=1") as caught:
        load({LAZY: "1"}, lazy=False)
    assert "graphs=hpu_graphs" in str(caught.value.mend)


def test_find_goes_through_modules_and_attributes():
    assert find("os.path.join").__name__ == "join"
    with pytest.raises(BackendError, match=r"no os.path.nothing"):
        find("os.path.nothing")
