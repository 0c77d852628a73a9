"""A step recorded as one native call: the same logits, bit for bit, as its ops one by one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry_cpu import native, program

PROMPTS = ["Once upon a time there was", "The wolf", "a", "In a deep forest there stood a house"]
PARAMS = SamplingParams(max_tokens=12, temperature=0, logprobs=1, ignore_eos=True)


def answers(**config):
    with LLM("demo", backend="cpu", max_model_len=128, **config) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [
        [(t, step[t].logprob) for t, step in zip(c.token_ids, c.logprobs, strict=True)]
        for c in (o.outputs[0] for o in outputs)
    ]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_recorded_step_gives_the_bits_of_its_ops(monkeypatch, quantization):
    made = []
    record = program._record

    def watched(*args):
        made.append(record(*args))
        return made[-1]

    monkeypatch.setattr(program, "_record", watched)
    recorded = answers(quantization=quantization)
    assert isinstance(made[0], program.Program)
    monkeypatch.setattr(program, "_record", lambda *args: None)
    assert answers(quantization=quantization) == recorded


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_pass_few_at_a_time_give_the_same_bits(monkeypatch, rows):
    made = []
    place = program._place

    def watched(lives, widths):
        made.append(lives)
        return place(lives, widths)

    monkeypatch.setattr(program, "_place", watched)
    whole = answers()
    lasting, passing = made
    assert len(passing) > len(lasting)  # most of what is between two attentions
    monkeypatch.setattr(native, "rows_of_a_pass", lambda: rows)
    assert answers() == whole


def test_what_a_program_cannot_do_stays_as_it_is():
    def step(batch, kv):
        return torch.sort(torch.ones(2, 3))[0]

    batch = program._small(_any_batch())
    assert program._record(step, batch, []) is None
    torch.testing.assert_close(program.recorded(step)(batch, []), torch.ones(2, 3))


def test_a_recording_that_is_wrong_is_never_used():
    calls = []

    def step(batch, kv):
        calls.append(1)  # gives something else each time: what was recorded cannot repeat it
        return torch.nn.functional.embedding(batch.token_ids, table)[batch.logit_rows.long()] * len(
            calls
        )

    table = torch.randn(8, 3)
    made = program._record(step, _any_batch(), [torch.zeros(1)])
    want = step(program._small(_any_batch()), []) / 2
    torch.testing.assert_close(made(program._small(_any_batch()), [torch.zeros(1)]), want)


def _any_batch():
    from tokenry.backend.base import StepBatch
    from tokenry.backend.contract import Bucket

    ints = torch.zeros(2, dtype=torch.int32)
    return StepBatch(
        bucket=Bucket("mixed", 1, 2, 0),
        token_ids=ints,
        positions=ints,
        slots=ints,
        q_start=ints,
        q_lens=ints,
        seq_lens=ints,
        block_table=ints[None],
        logit_rows=ints,
        extra={},
    )


def test_a_start_does_not_import_the_compiler_of_torch():
    code = (
        "import sys; from tokenry import LLM\n"
        "with LLM('demo', backend='cpu', max_model_len=64, progress=False) as llm:\n"
        "    llm.generate('a')\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
