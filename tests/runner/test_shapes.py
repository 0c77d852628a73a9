import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.contract import Caps, PhaseRules, ShapeRules
from tokenry.errors import UncoveredShape
from tokenry.params import SamplingParams
from tokenry.plan import NewRequest
from tokenry.runner.bucket_grid import make_buckets
from tokenry.runner.buckets import Need, choose, covers, exact, need_of, work
from tokenry.runner.pack import pack, table_width
from tokenry.runner.requests import RequestState
from tokenry.runner.shapes import Extent, Launch, Share, split

SIZE = 4


@st.composite
def devices(draw):
    uniform = draw(st.booleans())
    mixed = draw(st.booleans())
    return Caps(
        shapes=ShapeRules(
            static=True,
            uniform_q=uniform,
            kv_axis=draw(st.sampled_from(["none", "per_seq", "total"])),
            multiple_of=draw(st.sampled_from([{}, {"tokens": 8}, {"tokens": 16, "kv_blocks": 2}])),
            max_programs=draw(st.sampled_from([12, 40, 400])),
        ),
        phases=PhaseRules(
            mixed=mixed, max_prefill_seqs=None if mixed else draw(st.sampled_from([None, 1, 2]))
        ),
    )


@st.composite
def steps(draw, extent):
    """A legal step: rows within sequences and token budget, contexts within the model's length."""
    budget = extent.max_tokens
    shares = []
    for row in range(draw(st.integers(1, extent.max_seqs))):
        start = draw(st.integers(0, extent.max_blocks * SIZE - 1))
        most = min(budget, extent.max_blocks * SIZE - start)
        if most < 1:
            break
        count = draw(st.sampled_from([1, draw(st.integers(1, most))]))
        budget -= count
        shares.append(
            Share(
                row=row, start=start, count=count, sample=True, scored=draw(st.integers(0, 5)) == 0
            )
        )
    return shares


@settings(max_examples=150, deadline=None)
@given(caps=devices(), data=st.data())
def test_every_legal_step_is_covered_with_the_least_padding(caps, data):
    extent = Extent(max_seqs=5, max_tokens=48, max_blocks=12)
    buckets = make_buckets(caps, extent)
    for launch in split(data.draw(steps(extent)), caps, extent):
        need = need_of(launch, SIZE)
        chosen = choose(need, buckets, caps)
        assert covers(chosen, need, caps)
        rivals = [b for b in buckets if covers(b, need, caps)]
        assert work(chosen, caps) == min(work(b, caps) for b in rivals)


@settings(max_examples=80, deadline=None)
@given(caps=devices())
def test_programs_stay_within_what_the_device_holds(caps):
    buckets = make_buckets(caps, Extent(max_seqs=64, max_tokens=2048, max_blocks=128))
    assert len(buckets) <= caps.shapes.max_programs


@settings(max_examples=100, deadline=None)
@given(caps=devices(), data=st.data())
def test_launches_are_a_partition_in_order(caps, data):
    extent = Extent(max_seqs=5, max_tokens=48, max_blocks=12)
    shares = data.draw(steps(extent))
    pieces = {}
    for launch in split(shares, caps, extent):
        phases = {s.start > 0 and s.count <= caps.phases.max_decode_q for s in launch.shares}
        assert caps.phases.mixed or len(phases) == 1 or launch.scored
        for s in launch.shares:
            pieces.setdefault(s.row, []).append(s)
    for share in shares:
        parts = pieces[share.row]
        assert [p.start for p in parts] == [
            share.start + sum(q.count for q in parts[:i]) for i in range(len(parts))
        ]
        assert sum(p.count for p in parts) == share.count
        assert [p.sample for p in parts] == [False] * (len(parts) - 1) + [share.sample]


def test_a_shape_that_nothing_covers_is_an_error_on_a_static_device():
    caps = Caps(shapes=ShapeRules(static=True))
    need = Need(phase="mixed", seqs=9, tokens=9, q=1, kv_widest=1, kv_total=9)
    with pytest.raises(UncoveredShape, match="No warmed bucket covers"):
        choose(need, [], caps)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), uniform=st.booleans(), padding=st.integers(0, 3))
def test_packed_arrays_say_what_a_naive_packer_says(data, uniform, padding):
    extent = Extent(max_seqs=5, max_tokens=48, max_blocks=12)
    shares = [s for s in data.draw(steps(extent)) if not s.scored]
    if not shares:
        return
    rng = np.random.default_rng(0)
    states, known = [], []
    for share in shares:
        end = share.start + share.count
        unknown = data.draw(st.booleans()) and end > 1
        tokens = rng.integers(2, 90, end - unknown)
        new = NewRequest(
            request_id=str(share.row),
            token_ids=tuple(map(int, tokens)),
            num_prompt=1,
            params=SamplingParams(),
            seed=0,
            block_ids=tuple(map(int, rng.permutation(90)[: -(-end // SIZE)] + 1)),
        )
        state = RequestState(new, SIZE)
        state.feedback = 100 + share.row if unknown else None
        states.append(state)
        known.append(tokens)
    caps = Caps(shapes=ShapeRules(uniform_q=uniform))
    launch = Launch(phase="mixed", shares=tuple(shares))
    need = need_of(launch, SIZE)
    bucket = exact(need, caps)
    if padding:
        q = bucket.tokens // bucket.seqs
        more = (bucket.seqs + padding) * q if uniform else bucket.tokens + 2 * padding
        bucket = type(bucket)("mixed", bucket.seqs + padding, more, 0)
    width = table_width(bucket, need, caps, extent.max_blocks)
    host = pack(launch, states, bucket, width=width, block_size=SIZE, uniform_q=uniform).host
    q = bucket.tokens // bucket.seqs
    at = 0
    for i, (share, state) in enumerate(zip(shares, states, strict=True)):
        at = i * q if uniform else at
        assert host.q_start[i] == at
        assert (host.q_lens[i], host.seq_lens[i]) == (share.count, share.start + share.count)
        assert host.logit_rows[i] == at + share.count - 1
        for j in range(share.count):
            position = share.start + j
            block = int(state.blocks[position // SIZE])
            assert host.positions[at + j] == position
            assert host.slots[at + j] == block * SIZE + position % SIZE
            assert host.block_table[i, position // SIZE] == block
            if position < state.num_known:
                assert host.token_ids[at + j] == known[i][position]
                assert host.prev_row[at + j] == -1
            else:
                assert host.prev_row[at + j] == 100 + share.row
        at += share.count
    assert (host.seq_lens[len(shares) :] == 0).all()
    assert (host.block_table[len(shares) :] == 0).all()
    live = int(host.q_lens.sum())
    assert int((host.slots >= SIZE).sum()) == live, "padding must write to the null block"
