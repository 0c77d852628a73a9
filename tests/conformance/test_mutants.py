"""The kit bites: each backend that breaks a rule is caught by the check that names the rule."""

import pytest

from tokenry.conformance.cli import conform

CAUGHT = {
    # mutant: (check, words of its finding)
    "probe-loads-torch": ("C01.probe", "it loaded torch"),
    "probe-writes-environment": ("C01.probe", "MUTANT_DEVICES set"),
    "probe-differs": ("C01.probe", "probe 1"),
    "patches-torch": ("C01.patch", "torch.nn.functional.silu replaced"),
    "patches-core": ("C01.patch", "tokenry.backend.reference.Linear.__call__ replaced"),
    "switches-grad-mode": ("C01.patch", "grad mode: True -> False"),
    "writes-environment": ("C01.patch", "without a word: PYTORCH_MUTANT_MODE set"),
    "changes-argv": ("C01.patch", "sys.argv was changed"),
    "opens-everything": ("C02.open", "it opened somebody else's device"),
    "ignores-options": ("C02.open", "with the option no_such_option ignored"),
    "one-object": ("C02.open", "gave one object twice"),
    "claims-float64": ("C23.caps", "float64"),
    "claims-graphs": ("C23.caps", "graphs is 'cuda', not one of none, capture, aot"),
    "other-caps-each-time": ("C23.caps", "a second opening has others"),
    "claims-half": ("C23.dtypes", "KV of float16, blocks of 16: raised TypeError"),
    "more-than-all": ("C12.facts", "total 1073741824, free 1073741825"),
    "says-the-same": ("C12.kv", "used grew by 0"),
    "keeps-kv": ("C12.kv", "bytes higher than the first time"),
    "plans-too-much": ("C12.plan", "the ledger adds up to"),
    "ledger-of-another": ("C12.plan", "but kv is 0"),
    "blocks-without-budget": ("C13.refusals", "1 blocks in 0 bytes"),
    "untyped-oom": ("C13.oom", "raised RuntimeError: out of memory"),
    "grants-anything": ("C13.oom", "were granted"),
    "plans-by-what-is-used": ("C14.plan", "with KV in use"),
    "dirty-kv": ("C24.zeroed", "elements of layer 0 are not 0"),
    "fetches-aliases": ("C21.fetch", "overwritten after the call: 4096 of 4096"),
    "fetches-into-one-buffer": ("C21.fetch", "two under way"),
    "counts-batches": ("C22.attn_inputs", "the second call differs"),
    "shifts-the-table": ("C22.attn_inputs", "block_table"),
    "wide-inputs": ("C22.attn_inputs", "lengths is int64, not int32"),
    "ragged-inputs": ("C22.attn_inputs", "names and shapes"),
    "blind-at-block-edge": ("C03.attention", "beyond"),
    "looks-ahead": ("C03.attention", "beyond"),
    "forgets-cache": ("C03.attention", "cached+new: 15+2"),
    "wrong-heads": ("C03.attention", "H=4 KH=2"),
    "thinks-contiguous": ("C03.attention", "cached+new: 1+1"),
    "thinks-rope-contiguous": ("C03.rope", "result 0"),
    "window-too-long": ("C03.window", "window=5"),
    "no-soft-cap": ("C03.window", "softcap=1.0"),
    "writes-past-the-slot": ("C04.slots", "slots changed that are no row's"),
    "writes-padded-rows": ("C04.slots", "slots changed that are no row's"),
    "writes-last-row-only": ("C04.written", "decode step 1"),
    "padding-shifts-tables": ("C05.padding", "null block"),
    "forgets-bias": ("C03.linear", "+ bias: result 0: float32 [5, 96]"),
    "says-yes": ("C03.linear", "linear float32 [1, 40] -> 100"),
    "packs-in-place": ("C25.pack", "the given weight was changed"),
    "packs-into-one-buffer": ("C25.pack", "another pack changed the result"),
    "sums-by-batch-size": ("C07.ops", "linear float32 [33, 64]: 1 rows from row 0"),
    "forgets-residual": ("C03.rms_norm", "+ residual"),
    "turns-by-row": ("C03.rope", "rope float32 D=32"),
    "turns-pairs": ("C03.rope", "rope float32 D=32"),
    "gates-the-other-half": ("C03.act_mul", "act_mul silu float32"),
    "one-gelu": ("C03.act_mul", "act_mul gelu float32"),
    "never-renormalises": ("C03.moe", "top 1 renormalised"),
    "misses-nan": ("C03.sample_greedy", "rows 6 (NaN), 7 (inf) and 8 (all -inf) are broken"),
    "last-of-equals": ("C03.sample_greedy", "row 1 drew 299, expected 5"),
    "same-draw-always": ("C03.sample", "drew"),
    "forgets-top-p": ("C03.sample", "top_p"),
    "first-rows-top-k": ("C07.sample", "drew"),
    "first-logits": ("C05.step", "llama: prompt of 15"),
    "half-logits": ("C05.step", "torch.bfloat16, not [1, 96] torch.float32"),
    "stale-table": ("C08.replay", "decode of batch B"),
    "stale-tokens": ("C08.replay", "decode of batch B"),
    "baked-length": ("C09.scalars", "decode at"),
    "recompiles-for-lengths": ("C10.recompile", "compile_count went from"),
    "counts-nothing": ("C10.recompile", "compile_count says 0 after"),
    "peeks-in-a-step": ("C15.sync", "item()"),
    "waits-in-a-step": ("C15.sync", "__bool__"),
    "noisy-in-company": ("C07.step", "differ in their bits"),
    "loses-feedback": ("C16.feedback", "when waited for"),
    "few-blocks": ("C17.end_to_end", "the reference's best is"),
}
PARENTS = ("device", "plain-attention", "captured")


@pytest.mark.parametrize(("mutant", "found"), CAUGHT.items(), ids=CAUGHT)
def test_a_mutant_is_caught_by_the_check_that_names_its_rule(installed, mutant, found):
    check, words = found
    report = conform(mutant, only=[check], steps=60)
    result = next(r for r in report.results if r.id == check)
    assert result.status == "failed", result
    assert words in "\n".join(result.failures), result.failures
    assert not report.conforms


def test_nan_that_leaks_is_told_but_does_not_fail(installed):
    report = conform("multiplies-nan", only=["C06.nan"])
    assert [r.status for r in report.results] == ["weak"]
    assert "not finite" in report.results[0].failures[0]
    assert report.conforms


def test_attention_that_is_inside_the_model_is_not_asked_by_itself(installed):
    report = conform("own-kv", only=["C03.attention", "C04"])
    assert {r.status for r in report.results} == {"not asked"}
    assert "attention is inside build_model" in report.results[0].reason


@pytest.mark.slow
def test_what_the_compiler_of_torch_changes_is_not_the_backends_doing(installed):
    report = conform("compiled", only=["C01.patch"])
    assert [(r.status, r.failures) for r in report.results] == [("passed", ())]


@pytest.mark.parametrize("parent", PARENTS)
def test_the_parents_of_the_mutants_break_no_rule(installed, parent):
    ids = {check for check, _ in CAUGHT.values()} - {"C01.patch", "C17.end_to_end"}
    if parent == "plain-attention":  # it reads values on the host, which a step may not
        ids = {id for id in ids if id.startswith(("C03", "C04", "C05.padding"))}
    report = conform(parent, only=sorted(ids), steps=60)
    assert [r for r in report.results if r.status in ("failed", "weak")] == []


def test_every_mutant_is_asked_for(installed):
    assert set(installed) == {*CAUGHT, *PARENTS, "multiplies-nan", "compiled", "own-kv"}


def test_every_rule_has_a_mutant():
    from tokenry.conformance.catalog import CHECKS

    without = {one.id for one in CHECKS if one.must} - {check for check, _ in CAUGHT.values()}
    # one rank has nothing to break; the bits of attention are part of C07.step's
    assert without == {"C18.collectives", "C07.attention"}
