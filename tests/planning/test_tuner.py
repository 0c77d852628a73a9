"""A tuned set of buckets covers everything and pads less, also on loads that it has not seen."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.contract import Caps
from tokenry.backend.simulators.static import SimBaked, SimTotal
from tokenry.cli import main
from tokenry.engine.limits import EngineLimits
from tokenry.errors import ConfigError
from tokenry.planning.load import mixed_load, needs_of
from tokenry.planning.tuner import tune
from tokenry.planning.waste import waste_of
from tokenry.runner.bucket_file import bucket_file_text, read_bucket_file
from tokenry.runner.bucket_grid import make_buckets
from tokenry.runner.buckets import BucketSettings, BucketTable, need_of
from tokenry.runner.shapes import Extent, Share, split
from tokenry.runner.step_log import read_steps, step_line

LIMITS = EngineLimits(
    num_blocks=2000,
    block_size=16,
    max_model_len=2048,
    max_num_seqs=32,
    max_num_batched_tokens=512,
    overlap=False,
)
EXTENT = Extent(max_seqs=32, max_tokens=512, max_blocks=128, block_size=16, total_blocks=2000)
PRICE = BucketSettings().block_price


@pytest.fixture(scope="module")
def loads():
    """Two samples of one sort of load."""
    return [mixed_load(LIMITS, requests=250, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("limit", [64, 32, 16])
def test_the_tuner_cuts_the_padding_of_a_load_that_it_has_not_seen(loads, limit):
    caps = SimTotal.caps
    seen, fresh = (needs_of(load, caps, EXTENT) for load in loads)
    wanted = BucketSettings(max_programs=limit)
    default = make_buckets(caps, EXTENT, wanted)
    tuned = tune(seen, caps, EXTENT, wanted)
    assert len(tuned) <= limit
    for needs in (seen, fresh):
        before, after = (waste_of(needs, b, caps, PRICE) for b in (default, tuned))
        assert before.work == after.work
        assert after.work_run - after.work <= 0.7 * (before.work_run - before.work)


@pytest.mark.parametrize("caps", [SimTotal.caps, SimBaked.caps], ids=["total", "per_seq"])
def test_tuned_buckets_are_what_a_device_takes_from_the_file(loads, caps, tmp_path):
    needs = needs_of(loads[0], caps, EXTENT)
    tuned = tune(needs, caps, EXTENT, BucketSettings(max_programs=24))
    file = tmp_path / "buckets.yaml"
    file.write_text(bucket_file_text(tuned, max_programs=24, block_price=PRICE, comments=[]))
    assert make_buckets(caps, EXTENT, read_bucket_file(str(file))) == tuned


@st.composite
def steps(draw):
    shares, budget = [], EXTENT.max_tokens
    for row in range(draw(st.integers(1, 32))):
        start = draw(st.integers(0, 2047))
        count = draw(st.sampled_from([1, draw(st.integers(1, 2048 - start))]))
        if count > budget:
            break
        budget -= count
        shares.append(Share(row=row, start=start, count=count, sample=True))
    return shares


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(steps(), max_size=3), fresh=steps(), limit=st.sampled_from([3, 7, 30]))
def test_any_step_is_covered_whatever_was_tuned_on(samples, fresh, limit):
    caps = SimTotal.caps
    needs = needs_of([tuple(s) for s in samples if s], caps, EXTENT)
    tuned = tune(needs, caps, EXTENT, BucketSettings(max_programs=limit))
    assert len(tuned) <= limit
    table = BucketTable(tuned, caps)
    for launch in split(fresh, caps, EXTENT):
        assert table.choose(need_of(launch, 16)) in tuned


def test_a_generated_load_is_legal_and_the_same_every_time(loads):
    assert loads[0] == mixed_load(LIMITS, requests=250, seed=1) != loads[1]
    kinds = Counter()
    for step in loads[0]:
        assert sum(s.count for s in step) <= LIMITS.max_num_batched_tokens
        assert len(step) <= LIMITS.max_num_seqs
        assert all(s.start + s.count <= LIMITS.max_model_len for s in step)
        kinds.update("long" if s.count > 1 else "answer" for s in step)
    assert kinds["long"] > 100
    assert kinds["answer"] > 1000
    assert len({len(step) for step in loads[0]}) > 10, "concurrency should vary"


def test_a_load_recorded_with_larger_limits_is_cut(loads):
    small = Extent(max_seqs=4, max_tokens=64, max_blocks=32, block_size=16, total_blocks=200)
    needs = needs_of(loads[0], SimTotal.caps, small)
    table = BucketTable(make_buckets(SimTotal.caps, small), SimTotal.caps)
    assert all(table.choose(need) is not None for need in needs)
    assert max(need.seqs for need in needs) <= 4


def test_waste_is_counted_as_by_hand():
    caps = SimTotal.caps
    step = (
        Share(row=0, start=31, count=1, sample=True),
        Share(row=1, start=40, count=1, sample=True),
        Share(row=2, start=15, count=1, sample=True),
    )
    needs = needs_of([step, step], caps, EXTENT)
    whole = waste_of(needs, make_buckets(caps, EXTENT), caps, 0.5)
    # 3 rows and 2 + 3 + 1 blocks, in a bucket of 4 rows and 8 blocks, twice
    assert (whole.launches, whole.tokens, whole.tokens_run) == (2, 6, 8)
    assert (whole.blocks, whole.blocks_run) == (12, 16)
    assert whole.share == pytest.approx(1 - (6 + 6) / (8 + 8))


def test_a_device_with_free_shapes_has_nothing_to_tune():
    with pytest.raises(ConfigError, match="no fixed shapes"):
        tune({}, Caps(), EXTENT, BucketSettings())


# ---- the command -----------------------------------------------------------------------------

ENGINE = [
    "--backend", "sim-hpu", "--max-model-len", "2048", "--max-num-seqs", "32",
    "--max-num-batched-tokens", "512", "--num-kv-blocks", "2000",
]  # fmt: skip


@pytest.fixture
def recorded(loads, tmp_path):
    """The first load in a file."""
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(step_line(step) for step in loads[0]))
    assert read_steps(str(file))[0][0].count == loads[0][0][0].count
    return str(file)


def test_explain_prints_every_program_and_the_padding_of_the_load(recorded, capsys):
    assert main(["buckets", "demo", *ENGINE, "--explain", "--load", recorded]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    rows = [words for words in lines if words[1:2] in (["prefill"], ["decode"])]
    assert len(rows) == 64
    needs = needs_of(read_steps(recorded), SimTotal.caps, EXTENT)
    used = [row for row in rows if int(row[6]) > 0]
    assert sum(int(row[6]) for row in used) == sum(needs.values())
    whole = waste_of(needs, make_buckets(SimTotal.caps, EXTENT), SimTotal.caps, PRICE)
    assert f"{whole.share:.1%} of the work" in text
    assert f"{64 - len(used)} programs are not used" in text


def test_tune_writes_a_file_that_serves_the_load_better(recorded, tmp_path, capsys):
    file = str(tmp_path / "buckets.yaml")
    tuning = ["--tune", "--load", recorded, "--max-programs", "32", "--output", file]
    assert main(["buckets", "demo", *ENGINE, *tuning]) == 0
    assert "steps that judge" in capsys.readouterr().out
    settings = read_bucket_file(file)
    assert len(settings.buckets) <= 32
    assert main(["buckets", "demo", *ENGINE, "--load", recorded, "--bucket-file", file]) == 0
    assert "(from a file)" in capsys.readouterr().out


def test_a_dynamic_device_has_nothing_to_pad(capsys):
    sizes = ["--max-num-seqs", "8", "--num-kv-blocks", "300"]
    assert main(["buckets", "demo", "--backend", "sim-opaque", *sizes]) == 0
    assert "nothing to pad" in capsys.readouterr().out


def test_a_device_that_is_not_here_is_known_by_its_figures(capsys):
    sizes = ["--max-num-seqs", "8", "--max-model-len", "2048"]
    assert main(["buckets", "demo", "--device", "gaudi2x2", *sizes]) == 0
    assert "2 x Intel Gaudi 2: " in capsys.readouterr().out


def test_output_without_tune_is_refused(capsys):
    assert main(["buckets", "demo", *ENGINE, "--output", "x.yaml"]) == 2
    assert "--output is where --tune writes" in capsys.readouterr().err
