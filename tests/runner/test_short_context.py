"""Steps wider than the context: what is run to warm up and to measure stays within the model's
tables."""

import numpy as np
import pytest
from drive import Driver

from tokenry import LLM, SamplingParams
from tokenry.backend.contract import Bucket
from tokenry.runner.pack import blank_batch

BACKENDS = ["cpu", "sim-cuda", "sim-hpu", "sim-neuron", "sim-whole", "sim-opaque"]


@pytest.mark.parametrize("uniform_q", [False, True], ids=["ragged", "uniform"])
@pytest.mark.parametrize("seqs", [1, 3, 4])
def test_a_blank_batch_has_no_row_longer_than_the_context(seqs, uniform_q):
    bucket = Bucket("prefill", seqs, 24, 0)
    host = blank_batch(bucket, 2, uniform_q=uniform_q, max_len=5)
    assert host.positions.max() == 4
    assert host.q_lens.tolist() == [5] * seqs
    assert host.seq_lens.tolist() == [5] * seqs
    q = 24 // seqs if uniform_q else 5
    assert host.q_start.tolist() == [i * q for i in range(seqs + 1)]
    rows = [start + 4 for start in host.q_start[:-1].tolist()]
    assert host.logit_rows.tolist() == rows
    assert host.positions[rows].tolist() == [4] * seqs


@pytest.mark.parametrize("uniform_q", [False, True], ids=["ragged", "uniform"])
def test_a_blank_batch_fills_its_bucket_where_the_context_allows(uniform_q):
    host = blank_batch(Bucket("mixed", 4, 24, 0), 2, uniform_q=uniform_q, max_len=64)
    assert int(host.q_lens.sum()) == 24
    assert np.array_equal(host.positions, np.tile(np.arange(6), 4))


@pytest.mark.parametrize("max_model_len", [17, 33, 64])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_may_be_wider_than_the_context(make_runner, name, max_model_len):
    budget = 64 if name == "sim-whole" else 32
    runner = make_runner(
        name, context=max_model_len, max_model_len=max_model_len, max_num_batched_tokens=budget
    )
    driver = Driver(runner)
    driver.add("a", list(range(2, max_model_len + 1)))
    row = driver.run({"a": min(max_model_len - 1, 32)})["a"]
    assert row.error is None


@pytest.mark.parametrize("max_model_len", [2, 4, 15])
@pytest.mark.parametrize("name", ["cpu", "sim-hpu"])
def test_a_context_of_few_tokens_is_served(name, max_model_len):
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "num_kv_blocks": 40}
    with LLM("demo", backend=name, max_model_len=max_model_len, **limits) as llm:
        params = SamplingParams(max_tokens=max_model_len - 1, temperature=0, ignore_eos=True)
        output = llm.generate([[5]], params, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == max_model_len - 1
