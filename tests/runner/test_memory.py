import pytest

from tokenry.backend.base import Backend
from tokenry.backend.contract import KVPlan, KVSpec, MemoryInfo
from tokenry.errors import KVCacheTooSmall
from tokenry.runner.memory import MemoryLimits, check_weights_fit, plan_memory

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
MIB = 2**20


class Device(Backend):
    """Figures instead of a device; its step needs `activations` bytes while it runs."""

    def __init__(self, total, weights, activations=0):
        self._total, self.used, self._activations = total, weights, activations

    def memory(self):
        return MemoryInfo(total=self._total, free=self._total - self.used, used=self.used)

    def synchronize(self):
        """Nothing is in flight."""

    def probe(self):
        self.used += self._activations


def limits(**changes):
    values = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "max_model_len": None,
        "memory_fraction": 0.9,
        **changes,
    }
    return MemoryLimits(**values)


def plan(device, chosen, model_len=4096, **more):
    return plan_memory(device, SPEC, chosen, model_len=model_len, probe=device.probe, **more)


def test_the_ledger_adds_up_to_no_more_than_the_budget():
    device = Device(100 * MIB, weights=20 * MIB, activations=10 * MIB)
    made = plan(device, limits())
    assert made.ledger["weights"] == 20 * MIB
    assert made.ledger["activations"] == 10 * MIB
    assert made.ledger["kv"] == made.num_blocks * SPEC.block_bytes
    assert sum(made.ledger.values()) <= 90 * MIB
    assert sum(made.ledger.values()) > 90 * MIB - 2 * SPEC.block_bytes


def test_no_more_blocks_than_all_sequences_can_use():
    made = plan(Device(100_000 * MIB, weights=0), limits(max_num_seqs=2, max_model_len=64))
    assert made.num_blocks == 2 * 2 * 4 + 1
    assert made.notes[0].startswith("the KV cache takes 17 of the ")


def test_what_was_asked_for_is_never_cut():
    device = Device(100_000 * MIB, weights=0)
    few = {"max_num_seqs": 2, "max_model_len": 64}
    by_count = plan(device, limits(num_kv_blocks=5000, **few))
    by_bytes = plan(device, limits(kv_cache_bytes=5000 * SPEC.block_bytes, **few))
    assert (by_count.num_blocks, by_bytes.num_blocks) == (5000, 5000)
    assert by_count.notes == by_bytes.notes == ()


def test_what_was_used_before_the_weights_is_not_called_weights():
    made = plan(Device(100 * MIB, weights=20 * MIB), limits(), used_before=15 * MIB)
    assert made.ledger["runtime"] == 15 * MIB
    assert made.ledger["weights"] == 5 * MIB
    fixed = limits(num_kv_blocks=50, max_model_len=64)
    made = plan(Device(100 * MIB, weights=20 * MIB), fixed, used_before=15 * MIB)
    assert (made.ledger["runtime"], made.ledger["weights"]) == (15 * MIB, 5 * MIB)


def test_a_backend_that_knows_its_weights_keeps_them():
    class Exact(Device):
        def plan_kv(self, spec, budget, probe):
            kv = 300 * spec.block_bytes
            return KVPlan(num_blocks=300, ledger={"weights": 4 * MIB, "kv": kv})

    made = plan(Exact(100 * MIB, weights=20 * MIB), limits(), used_before=2 * MIB)
    assert made.ledger["weights"] == 4 * MIB
    assert "runtime" not in made.ledger


def test_a_context_that_does_not_fit_is_fitted_with_a_line_that_says_so():
    device = Device(10 * MIB, weights=7 * MIB)
    made = plan(device, limits(), model_len=100_000)
    assert made.max_model_len == (made.num_blocks - 1) * 16
    assert f"max_model_len fitted to {made.max_model_len} of the model's 100000" in made.notes[0]


def test_a_context_that_was_asked_for_is_refused_with_the_figures_and_the_flag():
    with pytest.raises(
        KVCacheTooSmall, match=r"One 100000-token request needs 0\.\d+ GiB"
    ) as caught:
        plan(Device(10 * MIB, weights=7 * MIB), limits(max_model_len=100_000))
    assert "--max-model-len" in caught.value.mend
    assert "--memory-fraction higher (now 0.9)" in caught.value.mend


def test_blocks_and_bytes_can_be_fixed():
    assert (
        plan(Device(100 * MIB, weights=0), limits(num_kv_blocks=50, max_model_len=64)).num_blocks
        == 50
    )
    by_bytes = limits(kv_cache_bytes=50 * SPEC.block_bytes + 5, max_model_len=64)
    assert plan(Device(100 * MIB, weights=0), by_bytes).num_blocks == 50
    with pytest.raises(KVCacheTooSmall, match="is free"):
        plan(Device(1 * MIB, weights=0), limits(num_kv_blocks=5000))


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded():
    memory = MemoryInfo(total=100 * MIB, free=80 * MIB, used=20 * MIB)
    check_weights_fit(60 * MIB, memory, 0.9)
    with pytest.raises(KVCacheTooSmall, match=r"The weights need 0\.08 GiB, 0\.07 GiB of 0\.10"):
        check_weights_fit(80 * MIB, memory, 0.9)


def test_a_backend_that_plans_by_formula_needs_no_probe():
    class Formula(Device):
        def plan_kv(self, spec, budget, probe):
            assert probe is None
            return KVPlan(num_blocks=7, ledger={"kv": 7 * spec.block_bytes})

    made = plan_memory(Formula(MIB, 0), SPEC, limits(max_model_len=96), model_len=4096, probe=None)
    assert made.num_blocks == 7
