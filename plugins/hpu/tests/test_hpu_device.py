"""The backend opened on the simulated device: symbols, modes, memory, errors, HCCL."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from simdevice import run_on_device

from tokenry.conformance.tiny import FAMILIES, write_model
from tokenry_hpu.vendor import DISTRIBUTION, SYMBOLS, find

OPEN = """
import json, os, sys
from pathlib import Path
import simdevice
import torch
import tokenry_hpu
from tokenry import LLM, SamplingParams
from tokenry.backend.base import GroupSpec
from tokenry.backend.contract import DeviceRef, KVSpec
from tokenry.errors import TokenryError
from tokenry_hpu.vendor import SYMBOLS, find

job = json.loads(sys.argv[1])
device = simdevice.current()

def probe(root):
    node = Path(root, "dev/accel/accel0")
    node.parent.mkdir(parents=True, exist_ok=True)
    node.touch()
    facts = Path(root, "sys/class/accel/accel0/device")
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "vendor").write_text("0x1da3")
    (facts / "device").write_text("0x1060")
    tokenry_hpu.ROOT = Path(root)

def backend(name="Gaudi 2", **options):
    ref = DeviceRef(backend="hpu", index=0, name=name, score=100)
    return tokenry_hpu.tokenry_open(ref, options, (1, 0))

def error(call):
    try:
        call()
    except TokenryError as caught:
        return [type(caught).__name__, str(caught)]
    return None
"""


def on_device(body, *, lazy="0", memory=2 << 30, **job):
    env = {"PT_HPU_LAZY_MODE": lazy}
    return run_on_device("hpu", OPEN + body, env=env, memory=memory, args=[json.dumps(job)]).value


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny model on disk, as JSON."""
    return str(write_model(tmp_path_factory.mktemp("tiny") / "llama", FAMILIES["llama"]).path)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """Facts of a backend in eager mode, from one process."""
    return on_device(
        """
kinds = {s.path: callable(find(s.path)) for s in SYMBOLS}
a, b = backend(), backend("Gaudi 3", graphs="none")
caps = [[x.caps.fp8, x.caps.graphs, x.caps.token_feedback, x.caps.dist] for x in (a, b)]
spec = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, block_size=128, dtype="bfloat16")
before = a.memory()
caught = error(lambda: a.alloc_kv(spec, 10000))
kv = a.alloc_kv(spec, 3)
shapes, content = [list(t.shape) for t in kv[0][:2]], float(kv[0].k.abs().sum())
kv = [before.total, before.used, caught, a.memory().used, 3 * spec.block_bytes, shapes, content]
import torch.distributed as dist
group = a.communicator(GroupSpec(
    ranks=(0,), rank=0, init_method="file://" + job["root"] + "/rendezvous"))
x = torch.ones(3, device="hpu")
dist.all_reduce(x, group=group)
hccl = [dist.get_backend(group), x.sum().item()]
dist.destroy_process_group()
simdevice.report(dict(kinds=kinds, caps=caps, kv=kv, hccl=hccl))
""",
        memory=16 << 20,
        root=str(tmp_path_factory.mktemp("group")),
    )


def test_the_stand_in_has_every_symbol(eager):
    kinds = eager["kinds"]
    assert len(kinds) == len({s.path for s in SYMBOLS}) == len(SYMBOLS)
    assert [path for path, ok in kinds.items() if not ok] == [
        "habana_frameworks.torch.distributed.hccl"
    ]


def test_the_installed_vendor_has_every_symbol():
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    for symbol in SYMBOLS:
        assert find(symbol.path) is not None


def test_symbols_say_signature_and_source():
    for symbol in SYMBOLS:
        assert symbol.signature
        assert symbol.source.split()[0].rstrip(";") in ("bridge", "docs"), symbol


def test_caps_tell_the_generations(eager):
    assert eager["caps"] == [["e4m3_240", "aot", True, "hccl"], ["e4m3fn", "none", True, "hccl"]]


def test_no_memory_for_the_kv_is_a_typed_error(eager):
    total, before, caught, used, size, shapes, content = eager["kv"]
    assert (total, before) == (16 << 20, 0)
    assert caught[0] == "DeviceOOM"
    assert "10000 KV blocks" in caught[1]
    assert used == size
    assert shapes == [[384, 2, 16], [384, 2, 16]]
    assert content == 0


def test_a_group_of_one_reduces_over_hccl(eager):
    assert eager["hccl"] == ["hccl", 3.0]


def test_opening_in_lazy_mode_needs_the_environment_of_the_process():
    caught = run_on_device(
        "hpu",
        OPEN + "simdevice.report(error(lambda: backend(graphs='hpu_graphs')))",
        args=["{}"],
    ).value
    assert caught[0] == "ConfigError"
    assert "loaded in the other mode" in caught[1]
    assert "PT_HPU_LAZY_MODE=1" in caught[1]


SERVE = """
probe(job["root"])
limits = dict(max_model_len=160, max_num_seqs=2, max_num_batched_tokens=128, block_size=16,
              max_programs=4)
def make(**options):
    pairs = tuple(f"{k}={v}" for k, v in options.items())
    return LLM(job["model"], backend="hpu", backend_option=pairs, **{**limits, **job["limits"]})
"""


def test_the_ledger_has_a_real_peak_and_the_memory_kept_for_programs(llama, tmp_path):
    body = """
with make(graphs="hpu_graphs", graph_memory_fraction=0.7) as llm:
    runner = llm._assembled.runner
    caps = runner._backend.caps
    simdevice.report([dict(llm.ready.ledger), runner.plan.num_blocks,
                      device.memory().allocated_bytes, list(llm.ready.notes),
                      llm.ready.device_name, caps.graphs, caps.token_feedback])
"""
    found = on_device(
        SERVE + body, lazy="1", memory=24 << 20, model=llama, root=str(tmp_path), limits={}
    )
    ledger, blocks, allocated, notes, name, graphs, feedback = found
    assert (name, graphs, feedback) == ("Gaudi 3", "capture", False)
    assert ledger["weights"] > 50_000
    assert ledger["activations"] > 50_000
    assert blocks > 20
    planned = ("weights", "activations", "margin")
    kept = 0.7 * (int((24 << 20) * 0.9) - sum(ledger[key] for key in planned))
    told = next(note for note in notes if note.startswith("programs hold"))
    assert f"{kept / 2**30:.3f} GiB was kept" in told
    assert 0 < ledger["programs"] < kept
    assert allocated < sum(ledger.values())


def test_what_does_not_fit_is_an_error_with_figures(llama, tmp_path):
    body = "simdevice.report(error(make))"
    caught = on_device(SERVE + body, memory=1 << 20, model=llama, root=str(tmp_path), limits={})
    assert caught[0] == "DeviceOOM"
    assert "1048576 bytes" in caught[1]
    assert "mend: --max-num-batched-tokens" in caught[1]


@pytest.fixture(scope="module")
def served(llama, tmp_path_factory):
    """What a model on the device does when things go wrong, and in FP8."""
    body = """
with make(graphs="none") as llm:
    runner = llm._assembled.runner
    buckets = runner._programs.buckets
    decode = [b for b in buckets if b.phase == "decode"][0]
    other = [b for b in buckets if b.phase != "decode"][0]
    program = runner._programs._programs[decode]
    shape = error(lambda: program(runner._blank(other, runner._extent)))
    batch = runner._blank(buckets[0], runner._extent)
    def step():
        with torch.inference_mode():
            runner._programs.run(batch)
    device.set_memory_limit(device.memory().allocated_bytes + 1000)
    memory = error(step)
    device.set_memory_limit(1 << 30)
    step()
prompt = [{"prompt_token_ids": list(range(40))}]
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
with make(graphs="none", linear="fp8") as llm:
    tokens = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    simdevice.report(dict(
        shape=shape, memory=memory, tokens=list(tokens), fallbacks=llm.get_metrics().op_fallbacks))
"""
    root = str(tmp_path_factory.mktemp("machine"))
    return on_device(SERVE + body, model=llama, root=root, limits={"num_kv_blocks": 30})


def test_memory_that_ends_in_a_program_is_a_typed_error(served):
    assert served["memory"][0] == "DeviceOOM"
    assert "graph_memory_fraction" in served["memory"][1]


def test_a_program_refuses_other_shapes_than_its_own(served):
    assert served["shape"][0] == "UncoveredShape"


def test_fp8_weights_serve_without_falling_back(served):
    assert len(served["tokens"]) == 4
    assert served["fallbacks"] == {}
