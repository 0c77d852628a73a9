"""An encoder whose device has no memory for some launches gives the same vectors."""

from typing import Any

import pytest

from tokenry.errors import DeviceOOM, StepFailed


def test_texts_that_did_not_fit_together_are_read_in_smaller_steps(
    bert: Any, open_llm: Any, words: Any
) -> None:
    llm = open_llm(bert[0], backend="sim-cuda", backend_option=(), max_num_seqs=8)
    texts = [words(*range(i, i + 2 + i % 9)) for i in range(20)]
    want = [v.outputs.embedding for v in llm.embed(texts, use_tqdm=False)]
    programs = llm._assembled.runner._programs
    run, calls = programs.run, []

    def scarce(batch: Any) -> Any:
        calls.append(batch.bucket.seqs)
        if len(calls) in fails:
            raise DeviceOOM(f"no memory for launch {len(calls)}")
        return run(batch)

    programs.run = scarce
    fails = {1, 2, 5}
    got = [v.outputs.embedding for v in llm.embed(texts, use_tqdm=False)]
    assert [pytest.approx(v, abs=1e-6) for v in got] == want
    assert llm.get_metrics().num_device_ooms == 3
    assert llm.get_metrics().step_failures == 0
    fails = set(range(1, 10_000))
    with pytest.raises(StepFailed, match="alone, 4 times"):
        llm.embed(texts[0], use_tqdm=False)
    fails = set()
    assert llm.embed(texts[3], use_tqdm=False)[0].outputs.embedding == pytest.approx(want[3])
