"""Programs, by a compiler of torch's own on host tensors: other shapes, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket
from tokenry.errors import BackendError, DeviceOOM, UncoveredShape
from tokenry_neuron import vendor
from tokenry_neuron.cache import ProgramCache
from tokenry_neuron.ops import greedy
from tokenry_neuron.programs import ProgramMaker


@pytest.fixture
def maker(tmp_path, monkeypatch):
    """maker(**how) -> a ProgramMaker; all of a test share one cache."""
    monkeypatch.setattr(vendor, "device_module", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(vendor, "COMPILER", "aot_eager")
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs/kept.neff").touch()
    cache = ProgramCache(tmp_path, tmp_path / "graphs")

    def make(*, require_compiled=False, **common):
        return ProgramMaker(cache, common, require_compiled=require_compiled)

    return make


def batch(bucket, width=4):
    """A batch of ones."""
    T, S = bucket.tokens, bucket.seqs
    sizes = {"q_start": (S + 1,), "q_lens": (S,), "seq_lens": (S,), "block_table": (S, width)}
    names = [n for n in StepBatch.__slots__ if n not in ("bucket", "extra")]
    tensors = {n: torch.ones(sizes.get(n, (T,)), dtype=torch.int32) for n in names}
    return StepBatch(bucket=bucket, extra={}, **tensors)


DECODE = Bucket("decode", 2, 2, 4)


def step(one):
    return one.token_ids.float() + one.block_table.sum(1)


def test_a_program_gives_what_the_step_gives_and_refuses_another_bucket(maker):
    programs = maker()
    program = programs.step(step, batch(DECODE), {})
    assert torch.equal(program(batch(DECODE)), step(batch(DECODE)))
    assert (programs.made, programs.compiled) == (1, 1)
    with pytest.raises(UncoveredShape, match="was given Bucket"):
        program(batch(Bucket("decode", 4, 4, 4)))


def test_another_shape_of_the_same_bucket_raises_instead_of_a_second_compilation(maker):
    program = maker().step(step, batch(DECODE), {})
    with pytest.raises(FailOnRecompileLimitHit):
        program(batch(DECODE, width=8))


def test_buckets_do_not_use_up_each_others_programs(maker):
    programs = maker()
    with torch._dynamo.config.patch(accumulated_recompile_limit=4):  # torch's own is 256
        made = [programs.step(step, batch(Bucket("decode", n, n, 4)), {}) for n in range(1, 13)]
        for n, program in enumerate(made, 1):
            assert program(batch(Bucket("decode", n, n, 4))).shape == (n,)


def test_a_sampler_is_made_once_per_shape(maker):
    programs = maker()
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert programs.sampler(greedy, logits).tolist() == [1]
    assert programs.sampler(greedy, -logits).tolist() == [0]
    programs.sampler(greedy, logits.expand(2, 3).contiguous())
    assert programs.made == 2


def test_kept_programs_are_found_with_equal_facts_only(maker):
    maker(torch="2.13").step(step, batch(DECODE), {"num_blocks": 9})
    same, other = maker(torch="2.13"), maker(torch="2.14")
    for programs in (same, other):
        programs.step(step, batch(DECODE), {"num_blocks": 9})
    assert (same.compiled, other.compiled) == (0, 1)
    strict = maker(torch="2.13", require_compiled=True)
    strict.step(step, batch(DECODE), {"num_blocks": 9})
    with pytest.raises(BackendError, match="num_blocks 9 instead of 10") as caught:
        strict.step(step, batch(DECODE), {"num_blocks": 10})
    assert "tokenry compile" in caught.value.mend


def test_a_compiler_that_compiles_a_kept_program_again_is_found_out(maker, tmp_path, monkeypatch):
    maker().step(step, batch(DECODE), {})

    def compiles(one):
        (tmp_path / "graphs/new.neff").touch()
        return step(one)

    monkeypatch.setattr(vendor, "compiled", lambda function: function)
    with pytest.raises(BackendError, match="made 1 files although it is listed"):
        maker(require_compiled=True).step(compiles, batch(DECODE), {})


def test_a_compiler_that_keeps_nothing_is_told_and_no_program_is_promised(maker, tmp_path, caplog):
    (tmp_path / "graphs/kept.neff").unlink()
    maker().step(step, batch(DECODE), {})
    assert "keeps nothing in" in caplog.text and "TORCH_NEURONX_NEFF_CACHE_DIR" in caplog.text
    again = maker()
    again.step(step, batch(DECODE), {})
    assert again.compiled == 1


def test_memory_that_ends_names_the_program(maker, monkeypatch):
    def full(one):
        raise torch.OutOfMemoryError("4 GiB")

    monkeypatch.setattr(vendor, "compiled", lambda function: function)
    with pytest.raises(DeviceOOM, match=r"program Bucket\(phase='decode'.*4 GiB"):
        maker().step(full, batch(DECODE), {})
