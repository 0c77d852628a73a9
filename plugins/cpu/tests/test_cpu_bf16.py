"""Products of bfloat16: activations rounded once, sums in float32, the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry_cpu import native, native_ops, program

WIDTHS = [(64, 96), (768, 300), (2049, 33), (1, 1), (7, 70)]


@pytest.fixture(params=[*native.isas(), *native.standins()])
def isa(request):
    """One instruction set after the other."""
    assert native.set_isa(request.param)
    yield request.param
    native.set_isa(native.isas()[0])


def error_of(format, x, weight, bias):
    """Relative error against float64 sums of the weight's own values."""
    y = native.Weight(weight, bias, format)(x)
    exact = x.double() @ weight.double().T + bias.double()
    return y, ((y - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_rounded_products_are_those_of_rounded_activations(isa, inner, outer):
    torch.manual_seed(inner)
    weight, bias = torch.randn(outer, inner).bfloat16(), torch.randn(outer)
    x = torch.randn(50, inner)
    y, error = error_of("bfloat16_dots", x, weight, bias)
    _, rounded = error_of("bfloat16_dots", x.bfloat16().float(), weight, bias)
    _, wide = error_of("bfloat16", x, weight, bias)
    assert wide < 1e-6  # nothing but float32 sums
    assert rounded < 1e-6  # activations that are bfloat16 already lose nothing
    assert error < 2.0**-8  # the rounding is half a unit of 8 bits at most
    same = native.Weight(weight, bias, "bfloat16_dots")(x.bfloat16().float())
    assert torch.equal(y, same)


@pytest.mark.parametrize("format", ["bfloat16", "bfloat16_dots"])
@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_a_row_keeps_its_bits(isa, format, inner, outer):
    torch.manual_seed(0)
    packed = native.Weight(torch.randn(outer, inner).bfloat16(), None, format)
    x = torch.randn(200, inner)
    full = packed(x)
    for first, count in ((0, 1), (17, 1), (3, 2), (5, 13), (1, 97)):
        assert torch.equal(packed(x[first : first + count]), full[first : first + count])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_activation_is_seen_in_its_row_only(isa, broken):
    packed = native.Weight(torch.randn(40, 65).bfloat16(), None, "bfloat16_dots")
    x = torch.randn(5, 65)
    x[2, 64] = broken
    y = packed(x)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


def test_activations_are_rounded_only_for_a_model_in_bfloat16():
    linear = native_ops.Linear()
    weights = {"weight": torch.randn(8, 8).bfloat16()}
    assert linear.pack(weights)["packed"].format == "bfloat16"
    linear.round_activations = True
    expected = "bfloat16_dots" if native.bf16_dots() else "bfloat16"
    assert linear.pack(weights)["packed"].format == expected
    assert linear.pack({"weight": torch.randn(8, 8)})["packed"].format == expected


def test_a_model_in_bfloat16_is_one_call_and_alone_or_among_others_the_same(monkeypatch):
    made = []
    record = program._record

    def watched(*args):
        made.append(record(*args))
        return made[-1]

    monkeypatch.setattr(program, "_record", watched)
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=1, ignore_eos=True)
    prompts = ["Once upon a time there was", "The wolf", "a", "In a deep forest stood a house"]
    with LLM("demo", backend="cpu", dtype="bfloat16", max_model_len=128) as llm:
        together = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        for prompt, want in zip(prompts, together, strict=True):
            (alone,) = llm.generate([prompt], params, use_tqdm=False)
            assert alone.outputs[0].token_ids == want.token_ids
            assert alone.outputs[0].logprobs == want.logprobs
    assert isinstance(made[0], program.Program)
    with LLM("demo", backend="cpu", dtype="float32", max_model_len=128) as llm:
        exact = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    for near, want in zip(together, exact, strict=True):
        first = want.token_ids[0]
        assert near.token_ids[0] == first
        assert near.logprobs[0][first].logprob == pytest.approx(
            want.logprobs[0][first].logprob, abs=0.05
        )
