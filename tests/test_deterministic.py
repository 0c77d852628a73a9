"""`deterministic`: the same request gives the same bits alone, in a batch of seven, cut into parts,
with and without overlap; and it is refused where nobody can promise that.
"""

from __future__ import annotations

import pytest

from tokenry import LLM, SamplingParams
from tokenry.backend.contract import DeviceRef
from tokenry.backend.invariance import open_device
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model
from tokenry.errors import ConfigError

PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=7, max_tokens=6, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=1, top_p=0.9, seed=8, max_tokens=6, logprobs=3, ignore_eos=True),
]
PROMPTS = [[(5 * i * i + 7 * i + 3 * n) % VOCAB for i in range(n)] for n in (33, 5, 18)]
BESIDE = [[(3 * i + 11 * n) % VOCAB for i in range(n)] for n in (2, 41, 9, 24)]
LIMITS = {"max_model_len": 64, "num_kv_blocks": 40, "dtype": "float32"}
HOW = {
    "alone": {"overlap": False, "max_num_seqs": 1, "enable_prefix_caching": False},
    "seven": {"max_num_seqs": 7, "overlap": False},
    "seven, overlapped": {"max_num_seqs": 7, "overlap": True},
    "chunks": {"max_num_seqs": 3, "max_num_batched_tokens": 7, "overlap": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's directory."""
    name, config = next(iter(FAMILIES.items()))
    return str(write_model(tmp_path_factory.mktemp("models") / name, config).path)


def serve(model, backend, how):
    """Tokens and exact log-probabilities of the three requests, each way of serving them."""
    alone = how["max_num_seqs"] == 1
    with LLM(model, backend=backend, deterministic=True, **LIMITS, **how) as llm:
        prompts = [{"prompt_token_ids": p} for p in (PROMPTS if alone else PROMPTS + BESIDE)]
        params = PARAMS if alone else PARAMS + [PARAMS[1]] * len(BESIDE)
        done = llm.generate(prompts, params, use_tqdm=False)[: len(PROMPTS)]
    bits = []
    for output in done:
        c = output.outputs[0]
        steps = [*c.logprobs, *(s for s in output.prompt_logprobs or () if s)]
        bits.append((c.token_ids, [sorted((t, x.logprob) for t, x in s.items()) for s in steps]))
    return bits


@pytest.mark.parametrize("backend", ["cpu", "sim-cuda"])
def test_same_request_same_bits(model, backend):
    found = {name: serve(model, backend, how) for name, how in HOW.items()}
    for name, bits in found.items():
        assert bits == found["alone"], name
    assert len({str(b) for b in found["alone"]}) == len(PROMPTS)


@pytest.mark.parametrize("backend", ["sim-hpu", "sim-neuron", "sim-opaque"])
def test_a_backend_without_such_a_mode_is_refused(backend):
    with pytest.raises(ConfigError, match="no mode in which they do not") as caught:
        LLM("demo", backend=backend, deterministic=True)
    assert "--backend cpu" in str(caught.value.mend)


def test_the_mode_is_off_unless_asked_for_and_two_opposite_wishes_are_refused():
    device = DeviceRef(backend="sim-cuda", index=0, name="simulator", score=0)
    assert not open_device(device, {}).caps.batch_invariant
    assert open_device(device, {}, deterministic=True).caps.batch_invariant
    assert open_device(device, {"deterministic": "true"}).caps.batch_invariant
    with pytest.raises(ConfigError, match="deterministic=false are opposites"):
        open_device(device, {"deterministic": "false"}, deterministic=True)
