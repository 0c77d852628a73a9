"""A step that the device has no memory for is tried again, smaller; nobody notices but who cannot
fit alone.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleRunner, drain, expected, limits, request, tokens_of
from test_beam_search import BeamRunner, beam_request

from tokenry.engine.core import EngineCore
from tokenry.engine.retreat import ALONE_TRIES, PATIENCE, Retreat

WHERE = st.sampled_from(["before", "middle", "wait"])
SHARED = [[], list(range(2, 8)), list(range(2, 14)), [5] * 9]
loads = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared beginning
        st.integers(1, 20),  # own tokens
        st.integers(0, 10),  # max_tokens
        st.integers(0, 9),  # arrives at this step
        st.sampled_from([{}, {"presence_penalty": 0.5}, {"prompt_logprobs": 0}]),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=120, deadline=None)
@given(
    load=loads,
    ooms=st.dictionaries(st.integers(1, 40), WHERE, max_size=20),
    overlap=st.booleans(),
    chunked=st.booleans(),
    num_blocks=st.sampled_from([12, 18, 64]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_tokens_are_those_of_a_run_without_the_fault(
    load, ooms, overlap, chunked, num_blocks, policy
):
    chosen = limits(
        num_blocks=num_blocks,
        max_num_batched_tokens=16 if chunked else 44,
        max_model_len=44,
        overlap=overlap,
        chunked_prefill=chunked,
        policy=policy,
    )
    engine = EngineCore(chosen, OracleRunner(4, oom_at=ooms))
    messages, events = {}, {}
    for step in range(2_000):
        for i, (which, own, max_tokens, arrival, params) in enumerate(load):
            if arrival == step:
                prompt = SHARED[which] + [2 + (i * 7 + j) % 40 for j in range(own)]
                one = request(f"r{i}", prompt, max_tokens=max_tokens, **params)
                messages[one.request_id] = one
                engine.add(one)
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        if step > 9 and not engine.has_work():
            break
    engine.close()
    failed = 0
    for request_id, message in messages.items():
        got, want = tokens_of(events[request_id]), expected(message, 44)
        if events[request_id][-1].finish_reason == "error":
            failed += 1
            assert got == want[: len(got)]
            assert f"alone, {ALONE_TRIES} times" in events[request_id][-1].error
        else:
            assert got == want, request_id
            scores = [e.prompt_logprobs for e in events[request_id] if e.prompt_logprobs]
            wanted = message.params.prompt_logprobs is not None and len(message.token_ids) > 1
            assert [len(s) for s in scores] == [len(message.token_ids) - 1] * wanted
    stats = engine.stats()
    assert stats.num_device_ooms == len([step for step in ooms if step <= stats.steps])
    assert failed == stats.step_failures <= len(ooms) // ALONE_TRIES
    assert stats.kv_usage == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_the_least_urgent_wait_and_steps_grow_again(overlap):
    runner = OracleRunner(4, oom_at={3: "before"})
    engine = EngineCore(limits(overlap=overlap, num_blocks=200), runner)
    messages = [request(f"r{i}", [2 + i] * 2, max_tokens=50) for i in range(8)]
    for message in messages:
        engine.add(message)
    events = drain(engine)
    assert {i: tokens_of(e) for i, e in events.items()} == {
        m.request_id: expected(m) for m in messages
    }
    rows = [[r.request_id for r in plan.rows] for plan in runner.plans]
    assert rows[2] == [f"r{i}" for i in range(8)]
    after = 4 if overlap else 3  # with overlap step 4 is launched when step 3 fails
    assert rows[after] == ["r0", "r1", "r2", "r3"]
    assert max(map(len, rows[after : after + 2 * PATIENCE])) == 4
    assert max(map(len, rows[after + 2 * PATIENCE :])) == 8
    preempted = {i: e[-1].num_preemptions for i, e in events.items()}
    assert preempted == {f"r{i}": int(i >= 4) for i in range(8)}
    assert engine.stats().num_preemptions == 4


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_a_request_that_fits_no_step_ends_with_the_figures_and_the_others_go_on(overlap):
    class Small(OracleRunner):
        """Its device holds no step of request `large`, however small."""

        def run(self, plan):
            self.oom_at = {} if all(r.request_id != "large" for r in plan.rows) else {
                plan.step: "before"
            }  # fmt: skip
            return super().run(plan)

    runner = Small(4)
    engine = EngineCore(limits(overlap=overlap), runner)
    others = [request("first", [3] * 6), request("large", [4] * 16), request("last", [5] * 6)]
    for message in others:
        engine.add(message)
    events = drain(engine)
    assert events["large"][-1].finish_reason == "error"
    told = events["large"][-1].error
    assert "no memory for a step of this request alone, 4 times: tokens 0 to 1 of 16" in told
    assert "planted in step" in told
    assert "mend: --max-num-batched-tokens" in told
    for message in (others[0], others[2]):
        assert tokens_of(events[message.request_id]) == expected(message)
    alone = [p.num_tokens for p in runner.plans if [r.request_id for r in p.rows] == ["large"]]
    assert alone == sorted(alone, reverse=True), "a step that did not fit was tried larger"
    assert engine.stats().step_failures == 1
    engine.add(request("after", [6] * 6))
    assert tokens_of(drain(engine)["after"]) == expected(request("after", [6] * 6))


def test_where_no_prompt_was_in_the_step_prompts_are_cut_no_smaller():
    retreat = Retreat(limits(max_num_seqs=8, max_num_batched_tokens=64))
    retreat.shrink(8, 8)
    assert (retreat.rows, retreat.tokens) == (4, 64)
    retreat.shrink(4, 5)
    assert (retreat.rows, retreat.tokens) == (2, 2)


def test_bounds_shrink_to_what_fits_and_come_back():
    retreat = Retreat(limits(max_num_seqs=8, max_num_batched_tokens=64))
    assert not retreat.on
    retreat.shrink(6, 40)
    assert (retreat.rows, retreat.tokens) == (3, 20)
    retreat.shrink(1, 20)
    assert (retreat.rows, retreat.tokens) == (1, 2)
    steps = 0
    while retreat.on:
        retreat.fitted()
        steps += 1
    assert (retreat.rows, retreat.tokens) == (8, 64)
    assert steps == 5 * 4 * PATIENCE  # 2 to 64 tokens, each doubling after 4 * PATIENCE steps
    whole = Retreat(limits(chunked_prefill=False, max_num_batched_tokens=64))
    whole.shrink(1, 64)
    assert (whole.rows, whole.tokens) == (1, 64)


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_a_beam_search_finds_the_same_answers(overlap):
    def answers(ooms):
        runner = BeamRunner(4)
        runner.oom_at = ooms
        engine = EngineCore(limits(overlap=overlap, num_blocks=20), runner)
        engine.add(beam_request("beams", range(2, 13), 3))
        engine.add(request("other", [3] * 7))
        events = drain(engine)
        assert engine.stats().num_device_ooms == len(ooms)
        assert engine.stats().kv_usage == 0
        return {name: tokens_of(e) for name, e in events.items()}

    want = answers({})
    assert len(want) == 4
    for step in range(1, 7):
        for where in ("before", "middle", "wait"):
            assert answers({step: where, step + 2: where}) == want, (step, where)
