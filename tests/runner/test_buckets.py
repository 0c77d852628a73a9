"""Whatever the device, the strategy and the limits: every step is covered, with the least padding,
by no more programs than the device holds.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from drive import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.contract import Bucket, Caps, PhaseRules, ShapeRules
from tokenry.backend.simulators.static import SimTotal
from tokenry.errors import ConfigError, DeviceOOM
from tokenry.runner.axes import STRATEGIES, AxisRule, axis_values
from tokenry.runner.bucket_grid import AXES, grid, kinds, make_buckets, maxima
from tokenry.runner.buckets import BucketSettings, BucketTable, covers, need_of, work
from tokenry.runner.merge import merge_down
from tokenry.runner.shapes import Extent, Share, split

SIZE = 4


@st.composite
def rules(draw):
    low = draw(st.integers(1, 8))
    return AxisRule(
        min=low,
        step=draw(st.sampled_from([None, 1, 3, 8])),
        max=draw(st.sampled_from([None, low, low + 20])),
        pad_max=draw(st.sampled_from([None, 2, 100])),
        pad_percent=draw(st.sampled_from([0, 25, 50])),
        values=draw(st.sampled_from([(), (2, 5), (7,)])),
    )


@st.composite
def devices(draw):
    mixed = draw(st.booleans())
    return Caps(
        shapes=ShapeRules(
            static=True,
            uniform_q=draw(st.booleans()),
            kv_axis=draw(st.sampled_from(["none", "per_seq", "total"])),
            multiple_of=draw(
                st.sampled_from([{}, {"tokens": 8}, {"tokens": 16, "kv_blocks": 2, "seqs": 2}])
            ),
            max_programs=draw(st.sampled_from([3, 12, 300])),
        ),
        phases=PhaseRules(
            mixed=mixed,
            chunked=draw(st.booleans()),
            max_prefill_seqs=None if mixed else draw(st.sampled_from([None, 1, 2])),
        ),
    )


@st.composite
def extents(draw):
    blocks = draw(st.integers(1, 12))
    seqs = draw(st.integers(1, 6))
    return Extent(
        max_seqs=seqs,
        max_tokens=draw(st.integers(seqs, 48)),
        max_blocks=blocks,
        block_size=SIZE,
        total_blocks=draw(st.sampled_from([None, blocks + 1, 3 * blocks])),
    )


@st.composite
def files(draw, caps, extent):
    """Settings with buckets of somebody else's making, rather too small or too large."""
    sizes = st.integers(1, 9)
    found = []
    for kind in draw(st.lists(st.sampled_from(kinds(caps)), max_size=6)):
        seqs, width = draw(sizes), draw(sizes)
        logits = "all" if kind.scored else "last"
        found.append(Bucket(kind.phase, seqs, seqs * width, draw(sizes), logits))
    return BucketSettings(buckets=tuple(found))


@st.composite
def bucket_settings(draw, caps, extent):
    if draw(st.booleans()):
        return draw(files(caps, extent))
    return BucketSettings(
        strategy=draw(st.sampled_from(STRATEGIES)),
        axes=draw(st.dictionaries(st.sampled_from(sorted(AXES)), rules(), max_size=3)),
        max_programs=draw(st.sampled_from([None, 3, 9])),
        block_price=draw(st.sampled_from([0.0, 0.2, 3.0])),
    )


@st.composite
def steps(draw, caps, extent):
    """A legal step: within sequences, token budget and the model's length."""
    budget, shares = extent.max_tokens, []
    for row in range(draw(st.integers(1, extent.max_seqs))):
        fresh = draw(st.booleans())
        start = 0 if fresh else draw(st.integers(0, extent.max_blocks * SIZE - 1))
        most = min(budget, extent.max_blocks * SIZE - start)
        if most < 1:
            break
        if start and not caps.phases.chunked:
            most = 1  # nothing but answers goes on where a prompt cannot be continued
        count = draw(st.sampled_from([1, draw(st.integers(1, most)), most]))
        budget -= count
        scored = fresh and draw(st.integers(0, 4)) == 0
        shares.append(Share(row=row, start=start, count=count, sample=True, scored=scored))
    return shares


@settings(max_examples=250, deadline=None)
@given(caps=devices(), extent=extents(), data=st.data())
def test_every_step_is_covered_with_the_least_padding_within_the_limit(caps, extent, data):
    wanted = data.draw(bucket_settings(caps, extent))
    buckets = make_buckets(caps, extent, wanted)
    assert len(buckets) <= min(caps.shapes.max_programs, wanted.max_programs or 10**9)
    table = BucketTable(buckets, caps, wanted.block_price)
    for launch in split(data.draw(steps(caps, extent)), caps, extent):
        need = need_of(launch, SIZE)
        chosen = table.choose(need)
        rivals = [b for b in buckets if covers(b, need, caps)]
        assert chosen in rivals
        price = wanted.block_price
        assert work(chosen, caps, price) == min(work(b, caps, price) for b in rivals)
        assert table.choose(need) is chosen


@settings(max_examples=60, deadline=None)
@given(caps=devices(), extent=extents(), data=st.data())
def test_buckets_have_sizes_that_the_device_takes(caps, extent, data):
    multiple = caps.shapes.multiple_of
    for bucket in make_buckets(caps, extent, data.draw(bucket_settings(caps, extent))):
        assert 1 <= bucket.seqs <= bucket.tokens
        assert bucket.seqs % multiple.get("seqs", 1) == 0
        assert bucket.kv_blocks % multiple.get("kv_blocks", 1) == 0
        assert (bucket.kv_blocks == 0) == (caps.shapes.kv_axis == "none")
        if caps.shapes.uniform_q:
            assert bucket.tokens % bucket.seqs == 0
        if caps.shapes.uniform_q and bucket.phase != "decode":
            assert bucket.tokens // bucket.seqs % multiple.get("tokens", 1) == 0


def test_the_grid_has_no_cell_that_no_step_reaches():
    """All steps of one prompt, tried one by one, choose every prefill cell."""
    caps = Caps(
        shapes=ShapeRules(
            static=True,
            uniform_q=True,
            kv_axis="total",
            multiple_of={"tokens": 4},
            max_programs=500,
        ),
        phases=PhaseRules(mixed=False, max_prefill_seqs=1),
    )
    extent = Extent(max_seqs=3, max_tokens=32, max_blocks=20, block_size=SIZE)
    buckets = make_buckets(caps, extent)
    assert len(buckets) == len(grid(caps, extent, BucketSettings()))
    table = BucketTable(buckets, caps)
    chosen = set()
    for start in range(20 * SIZE):
        for count in range(1, min(32, 20 * SIZE - start) + 1):
            share = Share(row=0, start=start, count=count, sample=True)
            for launch in split([share], caps, extent):
                chosen.add(table.choose(need_of(launch, SIZE)))
    for rows in range(1, 4):
        for total in range(rows, 20 * rows + 1):
            starts = [min(20, total - rows + 1)]
            while len(starts) < rows:
                starts.append(min(20, total - sum(starts) - (rows - len(starts) - 1)))
            shares = [
                Share(row=i, start=n * SIZE - 1, count=1, sample=True) for i, n in enumerate(starts)
            ]
            for launch in split(shares, caps, extent):
                chosen.add(table.choose(need_of(launch, SIZE)))
    assert {b for b in buckets if b.logits == "last"} == chosen


def test_decode_steps_larger_than_the_kv_cache_become_two_launches():
    """Rows that share a prefix count its blocks each; their sum may pass what the cache holds."""
    caps = Caps(
        shapes=ShapeRules(static=True, uniform_q=True, kv_axis="total"),
        phases=PhaseRules(mixed=False, max_prefill_seqs=1),
    )
    extent = Extent(max_seqs=4, max_tokens=8, max_blocks=10, block_size=SIZE, total_blocks=15)
    shares = [Share(row=i, start=7 * SIZE, count=1, sample=True) for i in range(4)]
    launches = list(split(shares, caps, extent))
    assert [len(launch.shares) for launch in launches] == [1, 1, 1, 1]
    assert max(b.kv_blocks for b in make_buckets(caps, extent)) == 15


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(rule=rules(), largest=st.integers(1, 3000), multiple=st.sampled_from([1, 2, 16]))
def test_an_axis_rises_to_its_largest_value(strategy, rule, largest, multiple):
    values = axis_values(strategy, rule, largest, multiple)
    assert values == sorted(set(values))
    assert values[-1] - multiple < largest <= values[-1]
    assert all(value % multiple == 0 for value in values)


def test_strategies_give_the_values_that_their_rules_say():
    assert axis_values("exponential", AxisRule(), 24) == [1, 2, 4, 8, 16, 24]
    assert axis_values("exponential", AxisRule(min=3, step=4, max=20), 100) == [4, 8, 12, 20, 100]
    assert axis_values("linear", AxisRule(min=2, step=8), 30) == [2, 4, 8, 16, 24, 30]
    assert axis_values("linear", AxisRule(min=1, step=8, max=16), 30) == [1, 2, 4, 8, 16, 30]
    assert axis_values("linear", AxisRule(values=(5, 3)), 30, 2) == [4, 6, 30]
    tight = axis_values("padding-aware", AxisRule(step=2, pad_percent=25, pad_max=6), 64)
    for below, value in itertools.pairwise(tight):
        padding = value - below - 1
        assert padding <= 6 + 1
        assert value <= 4 or 100 * padding <= 25 * value + 200


def test_padding_stays_below_the_percent_where_the_step_allows():
    values = axis_values("padding-aware", AxisRule(pad_percent=10, pad_max=10**6), 5000)
    for below, value in itertools.pairwise(values):
        assert value <= 16 or value - below - 1 <= 0.10 * value


@settings(max_examples=80, deadline=None)
@given(data=st.data(), limit=st.integers(1, 12))
def test_joined_boxes_cover_all_that_were_there(data, limit):
    n = data.draw(st.integers(1, 25))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    boxes = rng.integers(1, 20, (n, 3))
    groups = rng.integers(0, 3, n)
    left, of = merge_down(
        boxes, groups, rng.random(n), limit, lambda b, g: b.prod(axis=1).astype(float)
    )
    assert len(left) <= max(limit, len(set(groups.tolist())))
    for box, group in zip(boxes, groups, strict=True):
        assert ((left >= box).all(axis=1) & (of == group)).any()


def test_the_cheapest_join_comes_first():
    boxes = np.array([[1, 1, 1], [1, 1, 2], [1, 1, 100], [1, 1, 130]])
    left, _ = merge_down(
        boxes, np.zeros(4, np.int64), np.ones(4), 3, lambda b, g: b[:, 2].astype(float)
    )
    assert sorted(left[:, 2].tolist()) == [2, 100, 130]


def test_fewer_programs_waste_more_and_never_the_largest_step():
    caps = Caps(
        shapes=ShapeRules(
            static=True, uniform_q=True, kv_axis="total", multiple_of={"tokens": 16},
            max_programs=500,
        ),
        phases=PhaseRules(mixed=False, max_prefill_seqs=1),
    )  # fmt: skip
    extent = Extent(max_seqs=32, max_tokens=512, max_blocks=64, block_size=16)
    tops = None
    for limit in (200, 64, 24, 8, 3):
        buckets = make_buckets(caps, extent, BucketSettings(max_programs=limit))
        assert len(buckets) <= limit
        tops = tops or set(maxima(buckets))
        assert set(maxima(buckets)) == tops


def test_a_limit_below_one_program_per_kind_is_refused():
    caps = Caps(shapes=ShapeRules(static=True), phases=PhaseRules(mixed=False))
    extent = Extent(max_seqs=4, max_tokens=32, max_blocks=4)
    with pytest.raises(ConfigError, match="2 programs are too few: this device needs 3 kinds"):
        make_buckets(caps, extent, BucketSettings(max_programs=2))


def test_a_grid_of_any_fineness_is_coarsened():
    caps = Caps(
        shapes=ShapeRules(static=True, kv_axis="total", max_programs=20),
        phases=PhaseRules(mixed=False, max_prefill_seqs=1),
    )
    extent = Extent(max_seqs=64, max_tokens=2048, max_blocks=256, block_size=16)
    fine = {name: AxisRule(step=1) for name in ("prefill.tokens", "decode.kv_blocks")}
    assert len(make_buckets(caps, extent, BucketSettings(strategy="linear", axes=fine))) <= 20


@pytest.mark.parametrize("name", ["sim-hpu", "sim-neuron"])
@pytest.mark.parametrize(
    "wanted",
    [
        BucketSettings(strategy="linear", max_programs=14),
        BucketSettings(strategy="padding-aware", max_programs=9),
        BucketSettings(buckets=(Bucket("decode", 3, 3, 6), Bucket("prefill", 1, 16, 2))),
    ],
    ids=["linear", "padding-aware", "file"],
)
def test_nothing_compiles_in_service(make_runner, name, wanted):
    runner = make_runner(name, buckets=wanted)
    made = runner.compile_count()
    assert made == runner.stats()[0] <= min(64, wanted.max_programs or 64)
    driver = Driver(runner)
    driver.add("long", range(2, 42))
    driver.run({"long": 32})
    for request in ("a", "b", "c"):
        driver.add(request, range(2, 7 + len(request)))
    driver.run({"long": 8, "a": 6, "b": 6, "c": 6})
    for _ in range(12):
        driver.run(dict.fromkeys(("long", "a", "b", "c"), 1))
    assert runner.compile_count() == made
    assert runner.stats()[1] == 0


def test_settings_do_not_change_the_tokens(make_runner):
    def tokens(wanted):
        driver = Driver(make_runner("sim-hpu", buckets=wanted))
        driver.add("a", range(2, 20))
        found = [driver.run({"a": 18})["a"].token_ids]
        return found + [driver.run({"a": 1})["a"].token_ids for _ in range(8)]

    default = BucketSettings()
    assert tokens(default) == tokens(dataclasses.replace(default, max_programs=3))


@pytest.fixture
def small_pool():
    """small_pool(n): a sim-hpu that has memory for n programs."""

    class Small(SimTotal):
        def __init__(self, programs):
            super().__init__(2**30)
            self.programs = programs

        def compile(self, step, example):
            if self.compile_count() >= self.programs:
                raise DeviceOOM(f"No room for program {self.compile_count() + 1}.")
            return super().compile(step, example)

    return Small


def test_memory_that_ends_in_warm_up_leaves_fewer_programs_and_a_note(make_runner, small_pool):
    # three programs that cover everything were counted when memory was planned already
    runner = make_runner("sim-hpu", backend=small_pool(8))
    assert 3 < runner.stats()[0] <= 8
    assert "programs fit into the memory" in runner.notes[-1]
    driver = Driver(runner)
    driver.add("a", range(2, 22))
    driver.add("b", range(2, 9))
    driver.run({"a": 20, "b": 7})
    made = runner.compile_count()
    for _ in range(8):
        assert not driver.run({"a": 1, "b": 1})["a"].error
    assert runner.compile_count() == made


def test_too_little_memory_for_the_programs_that_cover_everything_is_an_error(
    make_runner, small_pool
):
    with pytest.raises(DeviceOOM, match="No memory to warm up Bucket"):
        make_runner("sim-hpu", backend=small_pool(1))


def test_what_becomes_of_a_file_is_told(make_runner):
    few = BucketSettings(max_programs=5)
    own = make_buckets(SimTotal.caps, make_runner("sim-hpu", buckets=few)._extent, few)
    assert make_runner("sim-hpu", buckets=BucketSettings(buckets=tuple(own))).notes == ()
    large = BucketSettings(buckets=(Bucket("decode", 900, 900, 9000),), max_programs=100)
    notes = make_runner("sim-hpu", buckets=large).notes
    assert "max_programs 100: the device holds 64" in notes
    assert any("of the 1 buckets of the file 0 are used as they are" in note for note in notes)


def test_a_file_for_another_device_is_refused(make_runner):
    other = BucketSettings(buckets=(Bucket("mixed", 4, 64, 0),))
    with pytest.raises(ConfigError, match="of no kind that this device has"):
        make_runner("sim-hpu", buckets=other)


def test_a_decode_step_in_several_launches_draws_the_same_tokens(make_runner):
    """Also while the host does not know the last tokens yet: they are taken from all launches."""

    def tokens(total_blocks):
        runner = make_runner("sim-hpu", buckets=BucketSettings(max_programs=6))
        runner._extent = dataclasses.replace(runner._extent, total_blocks=total_blocks)
        driver = Driver(runner)
        for i, name in enumerate("abcd"):
            driver.add(name, range(2 + i, 10 + 7 * i))
            driver.run({name: driver.known[name]})
        waits = [driver.launch(dict.fromkeys("abcd", 1)) for _ in range(4)]
        return [[(row.request_id, row.token_ids) for row in wait().rows] for wait in waits]

    assert tokens(4) == tokens(40)
