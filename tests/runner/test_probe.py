"""The memory that is planned for is that of the worst step that can come."""

import pytest
from drive import Driver

from tokenry.backend.base import Backend
from tokenry.backend.contract import Bucket, Caps, MemoryInfo, PhaseRules
from tokenry.params import SamplingParams
from tokenry.runner.probe import deep_batch, run_deep_steps
from tokenry.runner.shapes import Extent

EXTENT = Extent(max_seqs=4, max_tokens=1024, max_blocks=256, block_size=16)


class Greedy(Backend):
    """Its step needs memory for its tokens, for a tile of the context, and for its logits; `needs`
    are the bytes of every step.
    """

    caps = Caps(dtypes=("float32",))

    def __init__(self):
        self.needs, self.contexts, self.peak = [], [], 0

    def memory(self):
        return MemoryInfo(total=2**30, free=2**30 - self.peak, used=self.peak)

    def build_model(self, spec, weights, ops):
        step = super().build_model(spec, weights, ops)

        def counted(batch, kv):
            tile = int((batch.q_lens.clamp(max=256) * batch.seq_lens).max())
            logits = len(batch.logit_rows) * spec.vocab_size
            self.needs.append(8 * (batch.bucket.tokens * 32 + tile * 4 + logits * 64))
            self.peak = max(self.peak, self.needs[-1])
            self.contexts.append((int(batch.seq_lens.max()), kv[0].shape[1]))
            return step(batch, kv)

        return counted


def test_no_step_needs_more_than_the_probe_found(make_runner):
    backend = Greedy()
    runner = make_runner(backend=backend, num_kv_blocks=None, max_model_len=64, warmup=False)
    planned = runner.plan.ledger["activations"]
    assert planned == max(backend.needs)
    assert (64, 1) in backend.contexts, "no probe at the end of the context, on one block"
    backend.needs.clear()
    driver = Driver(runner)
    driver.add("long", [5 + i % 50 for i in range(63)])
    driver.add("scored", [3] * 40, SamplingParams(prompt_logprobs=2, max_tokens=1))
    for shares in ({"long": 32}, {"long": 31}, {"scored": 32}, {"scored": 8}):
        driver.run(shares)
    assert max(backend.needs) <= planned


def test_a_deep_batch_is_the_end_of_one_request_on_one_block():
    host = deep_batch(3, 40, width=3, block_size=16, bucket=Bucket("mixed", 1, 3, 0, "all"))
    assert host.positions.tolist() == [37, 38, 39]
    assert (host.seq_lens.tolist(), host.q_lens.tolist()) == ([40], [3])
    assert host.block_table.tolist() == [[0, 0, 0]]
    assert (host.slots < 16).all()
    assert host.logit_rows.tolist() == [0, 1, 2]


class Clock:
    def __init__(self, per_token):
        self.now, self.per_token, self.ran = 0.0, per_token, []

    def __call__(self):
        return self.now

    def execute(self, host):
        self.ran.append((host.bucket.tokens, host.bucket.logits, int(host.seq_lens[0])))
        self.now += host.bucket.tokens * self.per_token


@pytest.mark.parametrize(
    ("per_token", "ran"),
    [(1e-6, [16, 64, 256, 1024]), (1e-3, [16, 64, 256]), (5e-3, [16, 64]), (1.0, [16])],
)
def test_deep_steps_grow_while_there_is_time(per_token, ran):
    clock = Clock(per_token)
    assert run_deep_steps(clock.execute, Caps(), EXTENT, 4096, clock=clock) == ran[-1]
    assert clock.ran[0] == (256, "all", 256)
    assert clock.ran[1:] == [(tokens, "last", 4096) for tokens in ran]


def test_without_chunks_the_deep_step_is_the_whole_context():
    clock = Clock(0.0)
    caps = Caps(phases=PhaseRules(mixed=False, chunked=False))
    run_deep_steps(clock.execute, caps, EXTENT, 1000, clock=clock)
    assert clock.ran == [(1000, "all", 1000), (1000, "last", 1000)]
