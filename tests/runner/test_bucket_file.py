"""Bucket settings from flags and files, and the record of a load."""

import pytest

from tokenry.backend.contract import Bucket
from tokenry.errors import ConfigError
from tokenry.runner.axes import AxisRule
from tokenry.runner.bucket_file import bucket_file_text, bucket_settings, read_bucket_file
from tokenry.runner.shapes import Share
from tokenry.runner.step_log import StepLog, read_steps


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "buckets.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_sets_what_the_flags_leave_open(write):
    file = write(
        "strategy: linear\nmax_programs: 40\nblock_price: 0.5\n"
        "axes:\n  decode.seqs: {min: 2, step: 4}\n  prefill.tokens: {values: [64, 128]}\n"
    )
    settings = bucket_settings(file=file, axes=["decode.seqs=1:8:32"], max_programs=20)
    assert (settings.strategy, settings.max_programs, settings.block_price) == ("linear", 20, 0.5)
    assert settings.axes == {
        "decode.seqs": AxisRule(min=1, step=8, max=32),
        "prefill.tokens": AxisRule(values=(64, 128)),
    }


def test_what_the_tuner_writes_is_read_back(write):
    buckets = (
        Bucket("prefill", 1, 64, 4),
        Bucket("decode", 3, 3, 9),
        Bucket("mixed", 2, 8, 0, "all"),
    )
    text = bucket_file_text(buckets, max_programs=7, block_price=0.2, comments=["made by hand"])
    settings = read_bucket_file(write(text))
    assert (settings.buckets, settings.max_programs) == (buckets, 7)
    assert text.startswith("# made by hand\n")


def test_a_strategy_by_flag_sets_the_files_buckets_aside(write):
    file = write("buckets:\n  - {phase: decode, seqs: 2, tokens: 2, kv_blocks: 4}\n")
    assert bucket_settings(file=file).buckets
    assert not bucket_settings(file=file, strategy="linear").buckets


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("strategy: quadratic", "'quadratic' is not one of exponential"),
        ("max_program: 3", "max_programs"),
        ("axes: {decode.seq: {min: 1}}", "decode.seqs"),
        ("axes: {decode.seqs: {min: 8, max: 4}}", "max .4. is below min .8."),
        ("axes: {decode.seqs: {pad_percent: 80}}", "0..50"),
        ("axes: {decode.seqs: {min: few}}", "'few' is not a whole number"),
        ("buckets: [{phase: decode, seqs: 4, tokens: 2}]", "less than one for each"),
        ("buckets: [{phase: both, seqs: 4, tokens: 4}]", "phase 'both'"),
        ("buckets: 3", "not a list"),
        ("block_price: -1", "at least 0"),
        ("[1, 2]", "not a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(write, text, says):
    with pytest.raises(ConfigError, match=says):
        read_bucket_file(write(text))


@pytest.mark.parametrize("flag", ["decode.seqs=1:2", "decode.rows=1:2:3", "decode.seqs=1:b:3"])
def test_a_wrong_axis_flag_is_an_error(flag):
    with pytest.raises(ConfigError, match="--bucket-axis"):
        bucket_settings(axes=[flag])


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no bucket file"):
        read_bucket_file(str(tmp_path / "none.yaml"))


def test_recorded_steps_are_read_back(tmp_path):
    file = str(tmp_path / "steps.jsonl")
    steps = [
        (Share(row=0, start=0, count=7, sample=True, scored=True),),
        (
            Share(row=0, start=7, count=1, sample=True),
            Share(row=1, start=32, count=5, sample=True),
        ),
    ]
    log = StepLog(file)
    for step in steps:
        log.note(step)
    log.note(())
    assert read_steps(file) == steps


@pytest.mark.parametrize("line", ["{}", "[]", "x", '{"rows": [[1, 0]]}', '{"rows": [[1]]}'])
def test_a_line_that_is_no_step_is_an_error(tmp_path, line):
    file = tmp_path / "steps.jsonl"
    file.write_text('{"rows": [[0, 1]]}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"steps\.jsonl:2 is not a step"):
        read_steps(str(file))


def test_a_runner_records_its_steps(make_runner, tmp_path):
    from drive import Driver

    file = str(tmp_path / "steps.jsonl")
    driver = Driver(make_runner("sim-hpu", record_steps=file))
    driver.add("a", range(2, 9))
    driver.run({"a": 4})
    driver.run({"a": 3})
    driver.run({"a": 1})
    assert [[(s.start, s.count) for s in step] for step in read_steps(file)] == [
        [(0, 4)], [(4, 3)], [(7, 1)],
    ]  # fmt: skip
