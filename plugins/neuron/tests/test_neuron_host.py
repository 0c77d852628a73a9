"""What the plugin does without a device: probing, options, the vendor's absence, the cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokenry_neuron
from tokenry.backend.contract import DeviceRef
from tokenry.errors import BackendError, ConfigError
from tokenry_neuron import vendor
from tokenry_neuron.cache import ProgramCache
from tokenry_neuron.options import NeuronOptions

VERSION = "2.13.3.0.1"
FACTS = {"program": "decode 4", "torch": "2.13", "num_blocks": 40, "kv": {"dtype": "bfloat16"}}


@pytest.fixture
def machine(tmp_path):
    """machine(node=(device_name, arch_type), ...) -> root of a tree with these Neuron devices."""

    def make(**nodes):
        (tmp_path / "dev").mkdir()
        for node, (name, arch) in nodes.items():
            (tmp_path / "dev" / node).touch()
            facts = tmp_path / f"sys/devices/virtual/neuron_device/{node}/info/architecture"
            facts.mkdir(parents=True)
            (facts / "device_name").write_text(f"{name}\n")
            (facts / "arch_type").write_text(f"{arch}\n")
        return tmp_path

    return make


def test_without_a_node_there_is_no_device(machine):
    assert tokenry_neuron.probe(machine(), VERSION) is None


def test_devices_are_named_and_counted(machine):
    root = machine(neuron0=("Trainium2", "NCv3"), neuron1=("Trainium2", "NCv3"))
    found = tokenry_neuron.probe(root, VERSION)
    assert found == DeviceRef(backend="neuron", index=0, name="Trainium2 x2", score=100, why="NCv3")


def test_a_node_without_facts_is_still_a_device(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/neuron0").touch()
    (tmp_path / "dev/neuronlog").touch()
    found = tokenry_neuron.probe(tmp_path, VERSION)
    assert (found.name, found.score) == ("Neuron device", 100)


def test_an_old_chip_is_named_as_too_old(machine):
    found = tokenry_neuron.probe(machine(neuron0=("Trainium1", "NCv2")), VERSION)
    assert found.score == 0
    assert "Trainium1 (NCv2) is older than Trainium 2" in found.why


def test_a_missing_package_is_told_with_the_vendors_index(machine):
    root = machine(neuron0=("Trainium2", "NCv3"))
    found = tokenry_neuron.probe(root, None)
    assert found.score == 0
    assert "https://pip.repos.neuron.amazonaws.com" in found.why
    assert "PyPI is a stub" in found.why


@pytest.mark.parametrize("version", ["1.0", "1.13.1.1.0", "2.9.0.2.10"])
def test_a_package_that_is_not_the_native_backend_cannot_be_used(machine, version):
    found = tokenry_neuron.probe(machine(neuron0=("Trainium2", "NCv3")), version)
    assert found.score == 0
    assert f"torch-neuronx {version} is a stub or of the XLA line" in found.why


def test_probing_imports_no_torch_and_changes_no_variable():
    script = (
        "import os, sys; before = dict(os.environ); import tokenry_neuron; "
        "tokenry_neuron.tokenry_probe(); "
        "sys.exit('torch' in sys.modules or dict(os.environ) != before)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_another_backends_device_is_not_opened():
    cpu = DeviceRef(backend="cpu", index=0, name="", score=1)
    assert tokenry_neuron.tokenry_open(cpu, {}, (1, 0)) is None


def test_opening_without_the_package_says_where_the_vendor_keeps_it(monkeypatch):
    monkeypatch.setattr(vendor, "PACKAGE", "no_such_package")
    with pytest.raises(BackendError, match="No module named 'no_such_package'") as caught:
        vendor.connect({})
    assert "pip.repos.neuron.amazonaws.com" in caught.value.mend


def test_a_package_that_is_not_the_native_backend_is_refused(monkeypatch):
    monkeypatch.setattr(vendor, "PACKAGE", "json")
    monkeypatch.setattr(vendor, "DEVICE", "no_such_device")
    monkeypatch.setattr(vendor, "COMPILER", "no_such_compiler")
    with pytest.raises(BackendError, match=r"lacks torch\.neuron\.synchronize") as caught:
        vendor.connect({})
    assert "torch.compile(backend='no_such_compiler')" in caught.value.message


def test_the_users_variables_go_first(monkeypatch):
    monkeypatch.setattr(vendor, "PACKAGE", "json")
    monkeypatch.setattr(vendor, "missing", list)
    monkeypatch.setenv("TORCH_NEURONX_NEFF_CACHE_DIR", "/theirs")
    monkeypatch.delenv("TORCH_NEURONX_COMPILE_ONLY", raising=False)
    monkeypatch.setattr(vendor.os, "environ", dict(vendor.os.environ))
    held = vendor.connect(
        {"TORCH_NEURONX_NEFF_CACHE_DIR": "/ours", "TORCH_NEURONX_COMPILE_ONLY": "1"}
    )
    assert held == {"TORCH_NEURONX_NEFF_CACHE_DIR": "/theirs", "TORCH_NEURONX_COMPILE_ONLY": "1"}


def test_every_variable_of_the_vendor_is_listed():
    listed = {*vendor.VARIABLES, *vendor.READ_ONLY}
    used = set()
    for path in Path(vendor.__file__).parent.glob("*.py"):
        names = re.findall(r'"((?:TORCH_NEURONX|NEURON)_[A-Z_]+)"', path.read_text())
        used |= set(names)
    assert used == listed


# ---- options ------------------------------------------------------------------------------


def test_options_have_defaults_and_kinds(tmp_path):
    assert NeuronOptions.parse({}) == NeuronOptions()
    assert NeuronOptions.parse({"target": "trn3"}).hbm_bytes == 36 * 2**30
    given = {"hbm_gib": "0.5", "kv_fraction": ".4", "require_compiled": "true"}
    options = NeuronOptions.parse({**given, "cache_dir": str(tmp_path)})
    assert options.hbm_bytes == 2**29
    assert (options.kv_fraction, options.require_compiled) == (0.4, True)
    assert options.cache_dir == tmp_path
    assert not NeuronOptions.parse({"require_compiled": "false"}).require_compiled


@pytest.mark.parametrize(
    "given",
    [
        {"threads": "4"},
        {"target": "inf2"},
        {"hbm_gib": "much"},
        {"hbm_gib": "-1"},
        {"kv_fraction": "2"},
        {"require_compiled": "yes"},
    ],
    ids=str,
)
def test_a_wrong_option_is_named(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        NeuronOptions.parse(given)


# ---- the cache ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    graphs = tmp_path / "graphs/ab"
    graphs.mkdir(parents=True)
    (graphs / "one.neff").write_bytes(b"program")
    return ProgramCache(tmp_path, tmp_path / "graphs")


def test_a_stored_program_is_found_by_its_facts_alone(cache, tmp_path):
    assert cache.files() == {"ab/one.neff"}
    assert not cache.has(FACTS)
    cache.store(FACTS, cache.files())
    assert cache.has(FACTS)
    assert ProgramCache(tmp_path, tmp_path / "graphs").has(dict(reversed(FACTS.items())))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_counts(cache, name):
    cache.store(FACTS, [])
    other = {**FACTS, name: "another"}
    assert not cache.has(other)
    assert f"{name} {FACTS[name]!s} instead of another" in cache.explain_miss(other)


def test_a_program_whose_files_are_gone_is_missing(cache, tmp_path):
    cache.store(FACTS, cache.files())
    (tmp_path / "graphs/ab/one.neff").unlink()
    assert not cache.has(FACTS)
    assert "are gone" in cache.explain_miss(FACTS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}}', '{"facts": {}, "files": []}'])
def test_a_damaged_entry_is_missing(cache, tmp_path, text):
    cache.store(FACTS, [])
    (entry,) = (tmp_path / "programs").glob("*.json")
    assert json.loads(entry.read_text())["facts"] == FACTS
    entry.write_text(text)
    assert not cache.has(FACTS)
    assert "damaged" in cache.explain_miss(FACTS)


def test_an_empty_cache_says_so(cache, tmp_path):
    assert cache.explain_miss(FACTS) == f"{tmp_path / 'programs'} is empty"
