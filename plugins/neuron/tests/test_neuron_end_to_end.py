"""The plugin on the simulated device: the CPU backend's tokens, no compilation in service, and
programs that outlive the process, made with or without the device.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from simdevice import environment, run_on_device

from tokenry import LLM, SamplingParams
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model

LIMITS = {
    "dtype": "float32", "max_model_len": 160, "max_num_seqs": 2, "max_num_batched_tokens": 128,
    "block_size": 64,
}  # fmt: skip
STEPS, SAMPLERS = 4, 2 * 3
"""Programs: prefill with and without prompt scores, decode of one and of two requests; for one and
for two rows the greedy, the plain and the filtered draw.
"""
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 3, "logprobs": 2}
SCORED = {"temperature": 0, "prompt_logprobs": 2}
SCRIPT = """
import json, sys
from pathlib import Path

import simdevice
import tokenry_neuron
from tokenry import LLM, SamplingParams
from tokenry.errors import TokenryError
from tokenry_neuron import vendor

job = json.loads(sys.argv[1])
tokenry_neuron.ROOT = Path(job["root"])
device, found = simdevice.current(), {"missing": vendor.missing()}
prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
ways = [SamplingParams(max_tokens=8, ignore_eos=True, **way) for way in job["ways"]]
for name, (model, options, limits) in job["starts"].items():
    device.relax()
    device.reset_counts()
    try:
        llm = LLM(model, backend="neuron", backend_option=options, **limits)
    except TokenryError as error:
        found[name] = {"error": str(error)}
        continue
    with llm:
        runner = llm._assembled.runner
        made, compiled = runner.compile_count(), runner._backend.programs.compiled
        graphs, new = device.counts().programs, device.counts().compilations
        device.reset_counts()
        device.strict()
        tokens = [
            [list(c.outputs[0].token_ids) for c in llm.generate(prompts, way, use_tqdm=False)]
            for way in ways
        ]
        found[name] = dict(
            tokens=tokens, made=made, compiled=compiled, graphs=graphs, new=new,
            syncs=device.counts().host_syncs, later=device.counts().programs,
            counted_later=runner.compile_count() - made, fallbacks=llm.get_metrics().op_fallbacks,
            num_blocks=llm.ready.num_blocks, ledger=dict(llm.ready.ledger))
    del runner
simdevice.report(found)
"""


def prompts():
    """Three requests for two places: longer than a step's tokens, one token, and in between."""
    return [[(7 * i * i + 3 * i + 1) % VOCAB for i in range(n)] for n in (140, 1, 37)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of each model."""
    root = tmp_path_factory.mktemp("models")
    tiny = {name: write_model(root / name, config).path for name, config in FAMILIES.items()}
    return {name: str(path) for name, path in tiny.items()}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A file tree with a device node."""
    root = tmp_path_factory.mktemp("machine")
    (root / "dev").mkdir()
    (root / "dev/neuron0").touch()
    facts = root / "sys/devices/virtual/neuron_device/neuron0/info/architecture"
    facts.mkdir(parents=True)
    (facts / "arch_type").write_text("NCv3\n")
    return root


@pytest.fixture(scope="module")
def serve(machine):
    """serve(CACHE, name=(model, options, limits), ...) -> what each start gave, in one process."""

    def run(cache, ways=(GREEDY,), **starts):
        common = ("hbm_gib=1", f"cache_dir={cache}")
        starts = {
            name: (model, [*common, *options], {**LIMITS, **limits})
            for name, (model, options, limits) in starts.items()
        }
        job = {"root": str(machine), "prompts": prompts(), "ways": ways, "starts": starts}
        return run_on_device("neuron", SCRIPT, args=[json.dumps(job)]).value

    return run


@pytest.fixture(scope="module")
def served(serve, models, tmp_path_factory):
    """Every model, in all ways to draw."""
    starts = {name: (model, (), {}) for name, model in {"demo": "demo", **models}.items()}
    return serve(tmp_path_factory.mktemp("cache"), (GREEDY, SAMPLED, SCORED), **starts)


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_tokens_are_those_of_the_cpu(served, models, name):
    with LLM(models.get(name, name), backend="cpu", **LIMITS) as llm:
        wanted = [{"prompt_token_ids": p} for p in prompts()]
        for i, way in enumerate((GREEDY, SAMPLED, SCORED)):
            params = SamplingParams(max_tokens=8, ignore_eos=True, **way)
            expected = llm.generate(wanted, params, use_tqdm=False)
            assert served[name]["tokens"][i] == [list(c.outputs[0].token_ids) for c in expected]


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_every_program_is_made_before_service(served, name):
    run = served[name]
    assert run["made"] == run["graphs"] == STEPS + SAMPLERS
    assert run["compiled"] == run["new"]
    assert run["later"] == run["counted_later"] == 0


def test_samplers_are_shared_by_models_of_one_vocabulary(served):
    found = {name: served[name]["compiled"] for name in ("demo", "llama", "gemma2")}
    assert found == {"demo": STEPS + SAMPLERS, "llama": STEPS + SAMPLERS, "gemma2": STEPS}


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_nothing_waits_and_nothing_falls_back_in_service(served, name):
    assert served[name]["syncs"] == 0
    assert served[name]["fallbacks"] == {}


def test_all_vendor_symbols_are_there(served):
    assert served["missing"] == []


def test_the_plan_is_a_formula_and_its_ledger_adds_up(served):
    ledger = served["llama"]["ledger"]
    assert ledger["weights"] > 0
    assert ledger["kv"] <= 0.3 * 0.9 * 2**30


# ---- programs that are kept ------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(models, tmp_path_factory):
    """A cache that `tokenry compile` filled on a machine without the device, and what it said."""
    cache = tmp_path_factory.mktemp("compiled")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in LIMITS.items()]
    options = [f"--backend-option={o}" for o in ("hbm_gib=1", f"cache_dir={cache}")]
    command = [sys.executable, "-m", "tokenry", "compile", models["llama"], "--backend=neuron"]
    done = subprocess.run(
        [*command, *flags, *options],
        env=environment("neuron"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return cache, done.stdout


@pytest.fixture(scope="module")
def from_cache(compiled, serve, models):
    """Starts that find everything, or not, in that cache."""
    needed = ("require_compiled=true",)
    return serve(
        compiled[0],
        same=(models["llama"], needed, {}),
        more_requests=(models["llama"], needed, {"max_num_seqs": 4}),
        another_model=(models["gemma2"], needed, {}),
        too_big=(models["llama"], ("hbm_gib=3",), {}),
        another_chip=(models["llama"], ("target=trn3",), {}),
    )


def test_a_machine_without_the_device_fills_the_cache(compiled, from_cache):
    _, said = compiled
    run = from_cache["same"]
    assert f"{STEPS} programs of LlamaForCausalLM (float32) for neuron" in said
    assert f"with {run['num_blocks']} KV blocks" in said
    assert (run["made"], run["compiled"]) == (STEPS + SAMPLERS, 0)


def test_programs_of_the_cache_give_the_same_tokens(from_cache, served):
    assert from_cache["same"]["tokens"][0] == served["llama"]["tokens"][0]


def test_a_program_that_is_not_there_is_fatal_and_told(from_cache):
    error = from_cache["more_requests"]["error"]
    assert "the nearest program has num_blocks" in error
    assert "tokenry compile" in error
    error = from_cache["another_model"]["error"]
    assert "architecture LlamaForCausalLM instead of Gemma2ForCausalLM" in error


def test_a_plan_for_more_memory_than_the_device_has_is_refused(from_cache):
    error = from_cache["too_big"]["error"]
    assert "planned for 3.00 GiB (target trn2), the device has 2.00 GiB" in error
    assert "hbm_gib=2.0" in error


def test_programs_for_another_chip_than_the_one_here_are_refused(from_cache):
    error = from_cache["another_chip"]["error"]
    assert "The device is a trn2 (NCv3), target is trn3" in error


@pytest.mark.slow
def test_programs_whose_files_are_gone_are_compiled_again(from_cache, compiled, serve, models):
    cache, _ = compiled
    next((cache / "graphs").rglob("*.neff")).unlink()
    model = models["llama"]
    run = serve(cache, must=(model, ("require_compiled=true",), {}), may=(model, (), {}))
    assert "are gone" in run["must"]["error"]
    assert (run["may"]["made"], run["may"]["compiled"]) == (STEPS + SAMPLERS, 1)
