"""A model is packed while it is read: at no time is it in memory twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenry import LLM, SamplingParams
from tokenry.hub import find_model
from tokenry_cpu import backend, loading, native, native_ops
from tokenry_cpu.loading import let_go, mapping_of
from tokenry_cpu.memory import _status
from tokenry_cpu.rehearsal import Rehearsal

MAKE = Path(__file__).parents[3] / "benchmarks/make_model.py"
MEASURE = """
import json, sys
from pathlib import Path
from tokenry import LLM
from tokenry_cpu import backend, memory, native

root, sizes = Path("/"), []
build, init = backend.CpuBackend.build_model, native.Weight.__init__


def counted(self, *args, **more):
    init(self, *args, **more)
    sizes.append(self.nbytes)


def measured(self, *args):
    before = memory._status(root, "VmRSS")
    memory.reset_peak(root)
    step = build(self, *args)
    peak = memory.read_peak(root) - before
    print(json.dumps({"peak": peak, "packed": sum(sizes)}))
    return step


native.Weight.__init__, backend.CpuBackend.build_model = counted, measured
with LLM(sys.argv[1], backend="cpu", max_model_len=64, dtype=sys.argv[2],
         quantization=sys.argv[3] or None):
    pass
"""


@pytest.fixture
def file(tmp_path):
    """A checkpoint of 8 MiB, reached as in a hub's cache: by a link to a file without a suffix."""
    tensors = {f"t{i}": torch.full((512, 512), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "blob")
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "blob")
    return link


def test_the_mapping_of_a_checkpoint_is_found_and_of_other_memory_is_none(file):
    with safe_open(str(file), framework="pt") as tensors:
        tensor = tensors.get_tensor("t3")
        begin, end = mapping_of(tensor.data_ptr())
        assert begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
    assert mapping_of(torch.ones(10).data_ptr()) is None
    assert mapping_of(torch.ones(2**24).data_ptr()) is None
    assert mapping_of(0) is None


def test_a_file_leaves_memory_and_is_there_when_it_is_touched_again(file):
    def stream():
        with safe_open(str(file), framework="pt") as tensors:
            for i in range(8):
                tensor = tensors.get_tensor(f"t{i}")
                tensor.sum()
                yield f"t{i}", tensor

    def own():
        for name, tensor in stream():
            yield name, tensor.clone()  # not of the file: must be left alone

    before, kept = _status(Path("/"), "RssFile"), []
    for _, tensor in let_go(stream()):
        kept.append(tensor)
    assert _status(Path("/"), "RssFile") - before < 3 * 2**20
    for i, tensor in enumerate(kept):
        assert (tensor == i).all()
    for i, (_, tensor) in enumerate(list(let_go(own()))):
        assert (tensor == i).all()


def test_a_weight_that_is_narrower_than_its_dtype_is_found_in_any_row():
    wide = torch.randn(1500, 8).bfloat16().float()
    assert native.narrowest(wide).dtype == torch.bfloat16
    wide[1400, 3] = 1 + 2**-20
    assert native.narrowest(wide).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(not MAKE.is_file(), reason="benchmarks/ is not beside the plugin")
def test_the_peak_while_loading_is_little_more_than_the_packed_model(tmp_path):
    shape = "--hidden=512 --layers=12 --heads=8 --kv-heads=4 --mlp=2048 --vocab=4096"

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], check=True, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.stdout

    run(str(MAKE), str(tmp_path / "m"), *shape.split(" "))
    embedding, reading = 4 * 4096 * 512, 40 * 2**20  # the table; a tensor, its parts, its copy
    for dtype, quantization in (("float32", ""), ("bfloat16", ""), ("float32", "int8")):
        said = run("-c", MEASURE, str(tmp_path / "m"), dtype, quantization)
        line = next(x for x in said.splitlines() if x.startswith("{"))
        told = json.loads(line)
        most = told["packed"] + embedding + reading
        assert told["peak"] < most, (dtype, quantization, told)
        if (dtype, quantization) == ("float32", ""):
            assert told["packed"] > 150 * 2**20
            assert told["peak"] < 1.15 * (told["packed"] + embedding)


def test_memory_that_comes_where_a_file_was_is_not_taken_for_it(file):
    """A mapping is known by a tensor that lies in it: it cannot go while it is remembered."""

    def stream():
        with safe_open(str(file), framework="pt") as tensors:
            tensor = tensors.get_tensor("t0")
        begin, end = mapping_of(tensor.data_ptr())
        yield "t0", tensor
        del tensor
        own = [torch.full((end - begin,), 7, dtype=torch.uint8) for _ in range(4)]
        assert all(not begin <= t.data_ptr() < end for t in own)
        yield from ((str(i), t) for i, t in enumerate(own))

    for name, tensor in let_go(stream()):
        assert name == "t0" or (tensor == 7).all()


def test_a_file_is_looked_up_once_and_given_back_all_along(file, monkeypatch):
    asked, resident = [], []
    monkeypatch.setattr(loading, "mapping_of", lambda at: asked.append(at) or mapping_of(at))
    monkeypatch.setattr(loading, "BATCH_BYTES", 2 * 2**20)
    before = _status(Path("/"), "RssFile")
    with safe_open(str(file), framework="pt") as tensors:
        every = ((f"t{i}", tensors.get_tensor(f"t{i}")) for i in range(8))
        for _, tensor in let_go(every):
            tensor.sum()
            resident.append(_status(Path("/"), "RssFile") - before)
    assert len(asked) == 1
    assert max(resident) < 5 * 2**20, resident


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def narrow_model(tmp_path_factory, request):
    """The demo model with its weights in 16 bits."""
    source, to = find_model("demo"), tmp_path_factory.mktemp("narrow")
    for name in source.iterdir():
        if name.suffix in {".json", ".jinja"}:
            shutil.copy(name, to)
    config = json.loads((source / "config.json").read_text())
    kind = native.name_of(request.param)
    (to / "config.json").write_text(json.dumps({**config, "dtype": kind, "torch_dtype": kind}))
    weights = load_file(source / "model.safetensors")
    save_file({k: w.to(request.param) for k, w in weights.items()}, to / "model.safetensors")
    return to, request.param


@pytest.mark.parametrize("how", [{}, {"dtype": "float32"}, {"quantization": "int4"}], ids=str)
def test_weights_that_are_not_widened_on_their_way_give_the_same_bits(
    narrow_model, how, monkeypatch
):
    path, stored = narrow_model
    packed: list[torch.dtype] = []
    pack, quantize = native_ops.Linear.pack, native_ops.Linear.quantize

    def seen(op, weights, *more):
        packed.append(weights["weight"].dtype)
        return (quantize if more else pack)(op, weights, *more)

    def answer():
        params = SamplingParams(max_tokens=6, temperature=0, logprobs=1, ignore_eos=True)
        with LLM(str(path), backend="cpu", max_model_len=64, progress=False, **how) as llm:
            (output,) = llm.generate("Once upon a time there was", params, use_tqdm=False)
        completion = output.outputs[0]
        steps = zip(completion.token_ids, completion.logprobs, strict=True)
        return [(token, step[token].logprob) for token, step in steps]

    monkeypatch.setattr(native_ops.Linear, "pack", seen)
    monkeypatch.setattr(native_ops.Linear, "quantize", seen)
    got = answer()
    wide = packed.count(torch.float32)  # the head may be the embedding, which is
    assert wide <= 1 and packed.count(stored) == len(packed) - wide > 4
    monkeypatch.setattr(native_ops.Linear, "takes_narrow", False)
    assert got == answer()


def test_a_small_model_is_loaded_and_planned_with_one_of_torchs_threads(monkeypatch):
    seen: list[tuple[str, int]] = []

    def noting(owner, name):
        whole = getattr(owner, name)

        def noted(*args, **more):
            seen.append((name, torch.get_num_threads()))
            return whole(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    before = torch.get_num_threads()
    noting(native_ops.Linear, "pack")
    noting(Rehearsal, "__init__")
    options = {"backend": "cpu", "backend_option": ["threads=2"], "max_model_len": 64}
    try:
        with LLM("demo", progress=False, **options):
            assert torch.get_num_threads() == native.threads() == 2
        assert {*seen} == {("pack", 1), ("__init__", 1)}
        seen.clear()
        monkeypatch.setattr(backend, "SMALL_BYTES", 2**20)
        with LLM("demo", progress=False, **options):
            assert {*seen} == {("pack", 2), ("__init__", 2)}
    finally:
        torch.set_num_threads(before)
        native.set_threads(before)
