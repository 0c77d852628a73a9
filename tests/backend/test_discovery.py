"""Backends are found, reported and chosen; a broken one never takes the others with it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tokenry.backend import discovery
from tokenry.backend.contract import CONTRACT, Caps, DeviceRef, PhaseRules, ShapeRules
from tokenry.errors import BackendError, ConfigError, NoBackend

PLUGIN = """
from tokenry.backend.contract import Caps, DeviceRef, MemoryInfo, hookimpl

@hookimpl
def tokenry_probe():
    return DeviceRef(backend={name!r}, index=0, name="a device", score={score}, why={why!r})

@hookimpl
def tokenry_open(device, options, contract):
    from tokenry.backend.base import Backend

    class Device(Backend):
        caps = Caps(contract={contract})

        def memory(self):
            return MemoryInfo(total=1, free=1, used=0)

    {before}
    return Device()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs plugins: real entry points to real modules, in place of the environment's own."""
    entries = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(discovery, "entry_points", lambda group: entries)

    def add(name, source=None, *, score=10, why="", contract=CONTRACT, before=""):
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{len(entries)}"
        if source is None:
            facts = {"score": score, "why": why, "contract": contract, "before": before}
            source = PLUGIN.format(name=name, **facts)
        (tmp_path / f"{module}.py").write_text(source)
        entries.append(EntryPoint(name=name, value=module, group="tokenry.backends"))

    return add


@pytest.fixture
def empty_root(tmp_path):
    """A file system without device nodes."""
    return tmp_path / "root"


def test_the_installed_cpu_backend_is_found_without_importing_torch():
    code = (
        "import sys; from tokenry.backend import discovery as d; rows = d.discover();"
        "assert 'torch' not in sys.modules; print(d.table(rows))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "cpu" in done.stdout and "score 1" in done.stdout


def test_the_highest_score_is_chosen(install, empty_root):
    install("slow", score=1)
    install("fast", score=100)
    assert discovery.choose(discovery.discover(), None, root=empty_root).backend == "fast"


def test_a_broken_plugin_is_a_row_with_its_reason(install, empty_root):
    install("bad", "raise ImportError('libfoo.so.1 is missing')")
    install("quits", "import sys; sys.exit(3)")
    install("good", score=5)
    rows = {row.backend: row for row in discovery.discover()}
    assert rows["bad"].state == "broken" and "libfoo.so.1 is missing" in rows["bad"].reason
    assert rows["quits"].state == "broken"
    assert discovery.choose(list(rows.values()), None, root=empty_root).backend == "good"


def test_a_misspelt_hook_is_reported_by_its_name(install):
    source = PLUGIN.format(name="typo", score=1, why="", contract=CONTRACT, before="")
    install("typo", source.replace("tokenry_probe", "tokenry_prob"))
    (row,) = discovery.discover()
    assert row.state == "broken" and "tokenry_prob" in row.reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "does not implement tokenry_probe"),
        (PLUGIN.format(name="other", score=1, why="", contract=CONTRACT, before=""), "'other'"),
    ],
    ids=["no_hooks", "other_name"],
)
def test_a_plugin_that_is_none_is_reported(install, source, words):
    install("odd", source)
    (row,) = discovery.discover()
    assert row.state == "broken" and words in row.reason


def test_a_device_that_cannot_run_says_why(install, empty_root):
    install("old", score=0, why="driver 535 is older than 550")
    with pytest.raises(NoBackend, match="no: driver 535 is older than 550"):
        discovery.choose(discovery.discover(), None, root=empty_root)


def test_two_equal_devices_need_a_choice(install, empty_root):
    install("one", score=50)
    install("two", score=50)
    with pytest.raises(NoBackend, match="one, two are equally good") as caught:
        discovery.choose(discovery.discover(), None, root=empty_root)
    assert caught.value.mend == "--backend one"
    assert discovery.choose(discovery.discover(), "two", index=3).index == 3


def test_a_named_backend_loads_no_other(install):
    install("bad", "raise SystemError('must not be imported')")
    install("good")
    assert [row.backend for row in discovery.discover("good")] == ["good"]


def test_an_accelerator_without_its_backend_is_no_quiet_cpu_run(install, empty_root):
    install("cpu", score=1)
    known = next(k for k in discovery.known_backends() if k.nodes)
    node = empty_root / known.nodes[0].lstrip("/").replace("[0-9]*", "0")
    node.parent.mkdir(parents=True)
    node.touch()
    rows = discovery.discover()
    with pytest.raises(NoBackend) as caught:
        discovery.choose(rows, None, root=empty_root)
    assert node.name in str(caught.value) and known.install in str(caught.value)
    assert discovery.choose(rows, "cpu", root=empty_root).backend == "cpu"


def test_an_absent_backend_is_named_with_its_installation(install):
    with pytest.raises(NoBackend, match=r'not installed\s+mend: pip install "tokenry\[cpu\]"'):
        discovery.choose(discovery.discover("cpu"), "cpu")


@pytest.mark.parametrize(
    ("contract", "mend"),
    [((CONTRACT[0] + 1, 0), "upgrade tokenry"), ((CONTRACT[0] - 2, 0), "upgrade the x backend")],
    ids=["newer", "too_old"],
)
def test_another_contract_is_refused(install, contract, mend):
    install("x", contract=contract)
    with pytest.raises(BackendError) as caught:
        discovery.open_backend(ref("x"), {})
    assert caught.value.mend == mend


@pytest.mark.parametrize("contract", [(1, 0), (1, 1)], ids=str)
def test_the_minors_until_this_one_are_served_without_a_word(install, caplog, contract):
    assert contract <= CONTRACT
    install("x", contract=contract)
    with caplog.at_level(logging.WARNING):
        opened = discovery.open_backend(ref("x"), {})
    assert opened.caps.contract == contract and opened.memory().total == 1
    assert opened.caps.shapes.mixed_tokens == 0, "what 1.1 added is off where it is not named"
    assert "contract" not in caplog.text


def test_a_newer_minor_is_served_with_a_warning(install, caplog):
    install("x", contract=(CONTRACT[0], CONTRACT[1] + 1))
    with caplog.at_level(logging.WARNING):
        assert discovery.open_backend(ref("x"), {}).memory().total == 1
    assert "was tested with contract" in caplog.text


def test_without_any_backend_the_way_to_one_is_named(install):
    with pytest.raises(NoBackend, match="No backend is installed") as caught:
        discovery.check_installed(None)
    assert caught.value.mend == 'pip install "tokenry[cpu]"'


def test_a_backend_that_nobody_knows_is_refused_with_those_that_are(install):
    install("hot", "raise SystemExit('nothing is imported for this')")
    with pytest.raises(ConfigError, match="There is no backend 'ho'") as caught:
        discovery.check_installed("ho")
    assert "installed: hot" in str(caught.value)
    assert "sim-hpu" in str(caught.value)
    assert caught.value.mend == "--backend hot"


def test_a_known_backend_that_is_not_installed_names_its_installation(install):
    install("hot")
    with pytest.raises(NoBackend, match="'cpu' is not installed") as caught:
        discovery.check_installed("cpu")
    assert caught.value.mend == 'pip install "tokenry[cpu]"'


@pytest.mark.parametrize("wanted", [None, "hot", "sim-hpu"])
def test_without_torch_nothing_can_run(install, monkeypatch, wanted):
    install("hot")
    discovery.check_installed(wanted)
    monkeypatch.setattr(discovery, "find_spec", lambda name: None)
    with pytest.raises(NoBackend, match="torch is not installed") as caught:
        discovery.check_installed(wanted)
    assert caught.value.mend == 'pip install "tokenry[cpu]"'


def test_a_failed_open_names_the_cause(install):
    install("x", before="raise OSError('device busy')")
    with pytest.raises(BackendError, match=r"could not open .*: OSError: device busy"):
        discovery.open_backend(ref("x"), {})


def test_a_plugin_that_opens_something_else_is_refused(install):
    install("x", before="return 42")
    with pytest.raises(BackendError, match="gave a int, not a Backend"):
        discovery.open_backend(ref("x"), {})


@pytest.mark.parametrize(
    ("caps", "says"),
    [
        ("Caps(sampling='tokens')", "give token ids"),
        ("Caps(kv_dtypes=('float8',))", "holds KV as float8 only"),
        ("Caps(block_sizes=())", "no Caps.block_sizes"),
    ],
)
def test_what_the_core_cannot_honour_is_refused_when_it_is_opened(install, caps, says):
    install("x", before=f"Device.caps = {caps}")
    with pytest.raises(BackendError, match=says):
        discovery.open_backend(ref("x"), {})


@pytest.mark.parametrize("rules", [Caps, ShapeRules, PhaseRules])
def test_every_promise_of_the_contract_is_read_by_somebody(rules):
    """A field that nobody looks at lets a backend promise what nobody heeds."""
    root = Path(__file__).parents[2]
    files = [*root.glob("core/tokenry/**/*.py"), *root.glob("plugins/*/tokenry_*/**/*.py")]
    text = "\n".join(f.read_text() for f in files if f.name != "contract.py")
    unread = [f.name for f in fields(rules) if not re.search(rf"\.{f.name}\b", text)]
    assert unread == []


def test_an_option_that_nobody_reads_is_an_error(install):
    install("x", before="options.get('known')")
    assert discovery.open_backend(ref("x"), {"known": "1"})
    with pytest.raises(ConfigError, match="does not know the option sped"):
        discovery.open_backend(ref("x"), {"sped": "9"})


def test_simulators_are_opened_by_name_and_never_chosen(install, empty_root):
    install("cpu", score=1)
    assert discovery.choose(discovery.discover(), None, root=empty_root).backend == "cpu"
    for row in discovery.simulators():
        device = discovery.choose([], row.backend)
        opened = discovery.open_backend(device, {"memory": "4096"})
        assert opened.memory().total == 4096


def ref(name):
    return DeviceRef(backend=name, index=0, name="a device", score=10)


def test_a_device_that_is_not_here_can_be_compiled_for(install):
    install("gone", score=0, why="not plugged in")
    probes = discovery.discover("gone")
    with pytest.raises(NoBackend, match="not plugged in"):
        discovery.choose(probes, "gone")
    device = discovery.choose(probes, "gone", index=1, compile_only=True)
    assert device == DeviceRef(
        backend="gone", index=1, name="no device", score=0, why="for compiling only"
    )
    with pytest.raises(NoBackend):
        discovery.choose(probes, None, compile_only=True)
