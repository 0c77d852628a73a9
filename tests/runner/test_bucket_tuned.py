"""From a recorded load to a bucket file to an engine that pads less, on a static device."""

import pytest

from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.planning.load import needs_of, run_mixed_load
from tokenry.planning.tuner import tune
from tokenry.planning.waste import waste_of
from tokenry.runner.bucket_file import bucket_file_text, read_bucket_file
from tokenry.runner.bucket_grid import make_buckets
from tokenry.runner.buckets import BucketSettings
from tokenry.runner.step_log import read_steps

SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 48, "max_model_len": 64}
PROGRAMS = 16


class Witness:
    """Counts what the programs of a runner really run."""

    def __init__(self, runner):
        self.launches = self.tokens = self.blocks = 0
        self._run = runner._programs.run
        runner._programs.run = self.run

    def run(self, batch):
        self.launches += 1
        self.tokens += batch.bucket.tokens
        self.blocks += batch.bucket.kv_blocks
        return self._run(batch)


@pytest.fixture
def serve(make_runner, tmp_path):
    """serve(seed, settings) -> runner, recorded steps, witness, after a mixed load has run."""

    def serve(seed, settings):
        file = str(tmp_path / f"{seed}-{len(settings.buckets)}.jsonl")
        runner = make_runner(
            "sim-hpu", **SIZES, num_kv_blocks=60, buckets=settings, record_steps=file
        )
        made = runner.compile_count()
        witness = Witness(runner)
        limits = EngineLimits(num_blocks=60, block_size=runner.block_size, overlap=False, **SIZES)
        core = EngineCore(limits, runner)
        run_mixed_load(core, limits, requests=12, seed=seed, vocab_size=60)
        assert runner.compile_count() == made, "a program was made in service"
        assert core.stats().step_failures == 0
        return runner, read_steps(file), witness

    return serve


def test_what_was_recorded_tunes_buckets_and_foretells_their_padding(serve, tmp_path):
    default = BucketSettings(max_programs=PROGRAMS)
    runner, steps, _ = serve(1, default)
    caps, extent = runner._caps, runner._extent
    tuned = tune(needs_of(steps, caps, extent), caps, extent, default)
    file = tmp_path / "buckets.yaml"
    file.write_text(
        bucket_file_text(tuned, max_programs=PROGRAMS, block_price=0.2, comments=["by a test"])
    )
    other, fresh, witness = serve(2, read_bucket_file(str(file)))
    assert other.stats()[0] <= PROGRAMS
    needs = needs_of(fresh, caps, extent)
    before = waste_of(needs, make_buckets(caps, extent, default), caps, 0.2)
    after = waste_of(needs, tuned, caps, 0.2)
    assert (witness.launches, witness.tokens, witness.blocks) == (
        after.launches,
        after.tokens_run,
        after.blocks_run,
    )
    assert after.work_run < before.work_run
