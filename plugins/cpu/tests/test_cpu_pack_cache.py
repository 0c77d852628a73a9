"""Packed weights on disk: the same bits as packing again, whatever became of the files."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry.errors import ConfigError
from tokenry.hub import find_model
from tokenry_cpu import native, pack_cache
from tokenry_cpu.backend import CpuBackend, CpuOptions
from tokenry_cpu.pack_cache import HEAD, PackCache

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
           "int8": torch.float32, "int4": torch.float32}  # fmt: skip


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((70, 96), (70, 96), (33, 7))]


def loaded(directory, identity="one", seed=0, format="float32"):
    """The weights through a cache, and what it said."""
    cache = PackCache(directory, identity)
    packed = [cache.weight(w.to(FORMATS[format]), None, format) for w in weights(seed)]
    return packed, cache


def outputs(packed):
    return [w(torch.linspace(-1, 1, 3 * w.in_features).view(3, -1)) for w in packed]


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_computes_the_same_bits(tmp_path, format):
    first, _ = loaded(tmp_path, format=format)
    second, cache = loaded(tmp_path, format=format)
    assert cache._found == 3
    assert [bytes(a.memory()) for a in first] == [bytes(b.memory()) for b in second]
    del first
    for got, want in zip(
        outputs(second), outputs(loaded(tmp_path / "other", format=format)[0]), strict=True
    ):
        assert torch.equal(got, want)


def test_another_checkpoint_format_or_content_is_not_found(tmp_path):
    loaded(tmp_path)
    assert loaded(tmp_path, identity="two")[1]._found == 0
    assert loaded(tmp_path, format="int8")[1]._found == 0
    assert loaded(tmp_path, seed=1)[1]._found == 0
    assert loaded(tmp_path)[1]._found == 3


def test_another_layout_of_the_kernels_is_not_found(tmp_path, monkeypatch):
    loaded(tmp_path)
    monkeypatch.setattr(native, "layout", lambda: 10**6)
    assert loaded(tmp_path)[1]._found == 0


def damaged(file, how):
    whole = file.read_bytes()
    if how == "cut":
        file.write_bytes(whole[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "foreign":
        file.write_bytes(b"x" * len(whole))
    else:
        file.write_bytes(whole[:HEAD] + bytes(len(whole) - HEAD))


@pytest.mark.parametrize("how", ["cut", "empty", "foreign", "zeroed"])
def test_a_spoilt_file_is_written_anew_and_said(tmp_path, how, caplog):
    want = outputs(loaded(tmp_path)[0])
    damaged(sorted(tmp_path.rglob("*.packed"))[0], how)
    packed, cache = loaded(tmp_path)
    with caplog.at_level(logging.INFO, "tokenry.cpu"):
        cache.report()
    assert "2 of 3 weights were there, 1 files were cut short or foreign" in caplog.text
    assert len(caplog.records) == 1
    for got, expected in zip(outputs(packed), want, strict=True):
        assert torch.equal(got, expected)
    assert loaded(tmp_path)[1]._found == 3


def test_a_full_disk_is_no_failure(tmp_path, caplog, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack_cache.Path, "replace", full)
    packed, cache = loaded(tmp_path)
    cache.report()
    assert "could not be written: [Errno 28] No space left" in caplog.text
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # no half file is left behind
    monkeypatch.undo()
    for got, want in zip(outputs(packed), outputs(loaded(tmp_path)[0]), strict=True):
        assert torch.equal(got, want)


def test_a_directory_that_is_none_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    packed, cache = loaded(tmp_path / "file")
    cache.report()
    assert len(outputs(packed)) == 3 and "could not be written" in caplog.text


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_second_start_maps_and_a_changed_checkpoint_packs_again(tmp_path, quantization, caplog):
    model = tmp_path / "model"
    shutil.copytree(find_model("demo"), model)
    options = (f"pack_cache={tmp_path / 'cache'}",)
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=1)

    def start():
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, "tokenry.cpu"),
            LLM(
                str(model), backend="cpu", max_model_len=64, quantization=quantization,
                backend_option=options,
            ) as llm,
        ):  # fmt: skip
            (answer,) = llm.generate(["The wolf"], params, use_tqdm=False)
        (line,) = [r.message for r in caplog.records if "pack_cache" in r.message]
        found, count = (int(n) for n in line.split(": ")[1].split(" weights")[0].split(" of "))
        return answer.outputs[0].logprobs, found, count

    first, found, count = start()
    assert found == 0 < count
    assert start() == (first, count, count)
    (file,) = model.glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    assert start() == (first, 0, count)


def test_the_cache_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="pack_cache is for the native kernels"):
        CpuBackend(CpuOptions(kernels="torch", pack_cache="x"))


def test_dummy_weights_are_not_kept(tmp_path, caplog):
    with LLM(
        "demo", backend="cpu", load_format="dummy", max_model_len=64,
        backend_option=(f"pack_cache={tmp_path / 'cache'}",),
    ):  # fmt: skip
        pass
    assert "pack_cache is not used" in caplog.text
    assert not (tmp_path / "cache").exists()
