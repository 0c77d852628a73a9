"""The CPU as a device: what it finds, what it may use, what it refuses."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

import tokenry_cpu
from tokenry import LLM, SamplingParams
from tokenry.backend.contract import DeviceRef, KVSpec
from tokenry.errors import ConfigError, DeviceOOM
from tokenry_cpu import native
from tokenry_cpu.backend import CpuBackend, CpuOptions, usable_threads
from tokenry_cpu.memory import cpu_quota, memory_nodes, read_memory

GIB = 2**30
PROC = {
    "proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemFree: 1048576 kB\nMemAvailable: {8 * 2**20} kB",
    "proc/self/status": "Name:\tpython\nVmRSS:\t  2048 kB\n",
}


@pytest.fixture
def tree(tmp_path):
    """Writes a file tree and gives its root."""

    def write(files):
        for name, text in {**PROC, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def threads():
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_group_memory_is_the_machine(tree):
    memory = read_memory(tree({}))
    assert (memory.total, memory.free, memory.used) == (16 * GIB, 8 * GIB, 2048 * 1024)


def test_the_tightest_of_nested_version_2_groups_holds(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/memory.max": str(4 * GIB),
            "sys/fs/cgroup/pod/memory.current": str(3 * GIB),
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "sys/fs/cgroup/pod/box/memory.max": "max",
            "sys/fs/cgroup/pod/box/memory.current": "1",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
        }
    )
    memory = read_memory(root)
    assert (memory.total, memory.free) == (4 * GIB, 2 * GIB)
    assert cpu_quota(root) == 1.5


def test_version_1_limits_hold_and_no_limit_is_none(tree):
    root = tree(
        {
            "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(GIB // 2),
            "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 1024\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
        }
    )
    memory = read_memory(root)
    assert (memory.total, memory.free) == (GIB, GIB // 2 + 1024)
    assert cpu_quota(root) == 2.0


def test_a_container_that_sees_its_group_as_the_root_is_limited(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/system.slice/docker-1.scope\n",
            "sys/fs/cgroup/memory.max": str(GIB),
            "sys/fs/cgroup/memory.current": str(2 * GIB),
        }
    )
    memory = read_memory(root)
    assert (memory.total, memory.free) == (GIB, 0)


def test_threads_stay_below_the_quota(tree):
    root = tree({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert usable_threads(root) == 1


def test_the_probe_names_processor_and_instruction_sets(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Fast 9000\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    assert tokenry_cpu.read_cpuinfo(cpuinfo) == ("Fast 9000", ("avx2", "avx512f", "amx_tile"))
    name, isa = tokenry_cpu.read_cpuinfo(tmp_path / "missing")
    assert name and isa == ()


def test_another_plugins_device_is_not_opened():
    other = DeviceRef(backend="other", index=0, name="x", score=1)
    assert tokenry_cpu.tokenry_open(other, {}, (1, 0)) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [({"thread": "2"}, "has no option 'thread'"), ({"threads": "0"}, "threads=0"),
     ({"threads": "two"}, "threads=two")],
    ids=["unknown", "zero", "word"],
)  # fmt: skip
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        CpuOptions.parse(options)


def test_threads_are_set_by_the_option(threads):
    CpuBackend(CpuOptions.parse({"threads": "3"}))
    assert torch.get_num_threads() == 3


def test_variables_stand_in_for_options_that_are_not_given(threads):
    environ = {"TOKENRY_CPU_THREADS": "3", "TOKENRY_CPU_KV": "", "TOKENRY_MODEL": "demo"}
    assert CpuOptions.parse({}, environ) == CpuOptions(threads=3)
    assert CpuOptions.parse({"threads": "2"}, environ).threads == 2
    with pytest.raises(ConfigError, match="TOKENRY_CPU_THREDS"):
        CpuOptions.parse({}, {"TOKENRY_CPU_THREDS": "3"})
    with pytest.raises(ConfigError, match="threads=none"):
        CpuOptions.parse({}, {"TOKENRY_CPU_THREADS": "none"})


def test_a_variable_of_the_plugin_reaches_it_through_the_core(threads, monkeypatch):
    monkeypatch.setenv("TOKENRY_CPU_THREADS", "3")
    with LLM("demo", backend="cpu", max_model_len=64) as llm:
        assert llm.generate(["a"], SamplingParams(max_tokens=1), use_tqdm=False)
        assert torch.get_num_threads() == 3
    monkeypatch.setenv("TOKENRY_CPU_THREDS", "3")
    with pytest.raises(ConfigError, match="TOKENRY_CPU_THREDS"), LLM("demo", backend="cpu"):
        pass


def test_memory_nodes_are_those_that_this_process_may_use(tree):
    root = tree(
        {
            "sys/devices/system/node/node0/cpulist": "0-3,8\n",
            "sys/devices/system/node/node1/cpulist": "4-7,9-11\n",
            "sys/devices/system/node/node10/cpulist": "20\n",
            "sys/devices/system/node/node2/cpulist": "\n",
        }
    )
    assert memory_nodes(root, range(12)) == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 9, 10, 11]]
    assert memory_nodes(root, [5, 20]) == [[5], [20]]
    assert memory_nodes(root / "nowhere", [0]) == []


def test_threads_on_nodes_compute_the_same():
    weight, x = torch.randn(500, 64), torch.randn(3, 64)
    want = native.Weight(weight, None, "float32")(x)
    cpus = sorted(os.sched_getaffinity(0))
    native.set_nodes([cpus[:1], cpus[-1:], [10**6]])  # the last of them is not there
    native.set_threads(9)
    for _ in range(200):
        assert torch.equal(native.Weight(weight, None, "float32")(x), want)
    native.set_threads(1)
    native.set_nodes([])
    assert sorted(os.sched_getaffinity(0)) == cpus


def test_kernels_called_at_once_from_several_threads_compute_the_same():
    packed = native.Weight(torch.randn(700, 96), None, "float32")
    x = torch.randn(40, 96)
    want = packed(x)
    native.set_threads(4)
    with ThreadPoolExecutor(4) as callers:
        for _ in range(100):
            for got in callers.map(packed, [x, x[:1], x, x[:7]]):
                assert torch.equal(got, want[: len(got)])
    native.set_threads(1)


def test_kv_is_zeroed_and_too_much_is_refused(threads):
    backend = CpuBackend(CpuOptions(threads=1))
    spec = KVSpec(num_layers=2, num_kv_heads=2, head_dim=8, block_size=32, dtype="float32")
    layers = backend.alloc_kv(spec, 5)
    assert len(layers) == 2 and not any(layer.any() for layer in layers)
    assert sum(layer.nbytes for layer in layers) == 5 * spec.block_bytes
    with pytest.raises(DeviceOOM, match="GiB is free"):
        backend.alloc_kv(spec, backend.memory().total // spec.block_bytes + 1)
    assert backend.alloc_kv(spec, 1)


def test_kv_takes_memory_only_when_it_is_written():
    backend = CpuBackend(CpuOptions(threads=1))
    spec = KVSpec(num_layers=1, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32")
    before = psutil.Process().memory_info().rss
    (layer,) = backend.alloc_kv(spec, 2**30 // spec.block_bytes)
    layer[5] = 1
    assert layer[5].all() and not layer[4].any()
    assert psutil.Process().memory_info().rss - before < 2**28


def test_activations_are_the_peak_of_the_step_not_what_is_left_of_it():
    backend = CpuBackend(CpuOptions(threads=1))
    spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=32, block_size=16, dtype="float32")
    size = 300 * 2**20

    def probe():
        torch.ones(size, dtype=torch.uint8).sum()

    plan = backend.plan_kv(spec, backend.memory().total, probe)
    assert plan.ledger["activations"] >= size * 0.9
    assert plan.ledger["kv"] == plan.num_blocks * spec.block_bytes
