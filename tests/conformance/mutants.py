"""Backends that break one rule each, by name. Their parents break none: a test says so."""

import dataclasses

import mutant_backends as backends
import mutant_ops as ops
from mutant_backends import Device


def with_op(name, op, **caps):
    """A Device with one op of its own."""
    return type(
        op.__name__,
        (Device,),
        {"broken": {name: op}, "caps": dataclasses.replace(Device.caps, **caps)},
    )


MUTANTS = {
    "device": Device,
    "plain-attention": with_op("attention", ops.Plain),
    "captured": backends.Captured,
    "compiled": backends.Compiled,
    "blind-at-block-edge": with_op("attention", ops.BlindAtBlockEdge),
    "looks-ahead": with_op("attention", ops.LooksAhead),
    "forgets-cache": with_op("attention", ops.ForgetsCache),
    "window-too-long": with_op("attention", ops.WindowTooLong),
    "no-soft-cap": with_op("attention", ops.NoSoftCap),
    "wrong-heads": with_op("attention", ops.WrongHeads),
    "thinks-contiguous": with_op("attention", ops.ThinksContiguous),
    "thinks-rope-contiguous": with_op("rope", ops.TurnsContiguous),
    "own-kv": backends.OwnKV,
    "writes-past-the-slot": with_op("attention", ops.WritesPastTheSlot),
    "writes-padded-rows": with_op("attention", ops.WritesPaddedRows),
    "writes-last-row-only": with_op("attention", ops.WritesLastRowOnly),
    "padding-shifts-tables": with_op("attention", ops.PaddingShiftsTables),
    "multiplies-nan": with_op("attention", ops.MultipliesNaN),
    "few-blocks": with_op("attention", ops.FewBlocks),
    "forgets-bias": with_op("linear", ops.ForgetsBias),
    "sums-by-batch-size": with_op("linear", ops.SumsByBatchSize, batch_invariant=True),
    "says-yes": with_op("linear", ops.SaysYes),
    "packs-in-place": with_op("linear", ops.PacksInPlace),
    "packs-into-one-buffer": with_op("linear", ops.PacksIntoOneBuffer),
    "forgets-residual": with_op("rms_norm", ops.ForgetsResidual),
    "turns-by-row": with_op("rope", ops.TurnsByRow),
    "turns-pairs": with_op("rope", ops.TurnsPairs),
    "gates-the-other-half": with_op("act_mul", ops.GatesTheOtherHalf),
    "one-gelu": with_op("act_mul", ops.OneGelu),
    "never-renormalises": with_op("moe", ops.NeverRenormalises),
    "last-of-equals": with_op("sample", ops.LastOfEquals),
    "misses-nan": with_op("sample", ops.MissesNan),
    "same-draw-always": with_op("sample", ops.SameDrawAlways),
    "first-rows-top-k": with_op("sample", ops.FirstRowsTopK),
    "forgets-top-p": with_op("sample", ops.ForgetsTopP),
    "says-the-same": backends.SaysTheSame,
    "keeps-kv": backends.KeepsKV,
    "more-than-all": backends.MoreThanAll,
    "plans-too-much": backends.PlansTooMuch,
    "ledger-of-another": backends.LedgerOfAnother,
    "blocks-without-budget": backends.BlocksWithoutBudget,
    "untyped-oom": backends.UntypedOOM,
    "grants-anything": backends.GrantsAnything,
    "plans-by-what-is-used": backends.PlansByWhatIsUsed,
    "dirty-kv": backends.DirtyKV,
    "fetches-aliases": backends.FetchesAliases,
    "fetches-into-one-buffer": backends.FetchesIntoOneBuffer,
    "counts-batches": backends.CountsBatches,
    "shifts-the-table": backends.ShiftsTheTable,
    "wide-inputs": backends.WideInputs,
    "ragged-inputs": backends.RaggedInputs,
    "stale-table": backends.StaleTable,
    "stale-tokens": backends.StaleTokens,
    "baked-length": backends.BakedLength,
    "recompiles-for-lengths": backends.RecompilesForLengths,
    "counts-nothing": backends.CountsNothing,
    "peeks-in-a-step": backends.PeeksInAStep,
    "waits-in-a-step": backends.WaitsInAStep,
    "loses-feedback": backends.LosesFeedback,
    "first-logits": backends.FirstLogits,
    "half-logits": backends.HalfLogits,
    "noisy-in-company": backends.NoisyInCompany,
    "claims-float64": backends.ClaimsFloat64,
    "claims-graphs": backends.ClaimsGraphs,
    "other-caps-each-time": backends.OtherCapsEachTime,
    "claims-half": backends.ClaimsHalf,
}
