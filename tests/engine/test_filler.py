"""Fillers (a batch's lines) run on what the others leave: they change nothing of what those get."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleRunner, drain, expected, limits, request, tokens_of

from tokenry.engine.core import EngineCore

POLICIES = ("fcfs", "priority", "slo")
loads = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(0, 12),  # max_tokens
        st.integers(0, 3),  # priority
        st.integers(0, 12),  # arrives at this step
        st.one_of(st.none(), st.integers(0, 14)),  # aborted at this step
    ),
    min_size=1,
    max_size=8,
)


def filler(name, prompt, **params):
    return msgspec.structs.replace(request(name, prompt, **params), filler=True)


def engine_of(*, clock=None, **changes):
    settings_ = limits(**changes)
    runner = OracleRunner(settings_.block_size)
    more = {} if clock is None else {"clock": clock}
    return EngineCore(settings_, runner, **more), runner


def watch(engine):
    """From here on, whoever loses its blocks is a filler while one has any."""
    roster = engine._scheduler._roster
    preempt = roster.preempt

    def checked(victim):
        assert victim.filler or not any(r.filler for r in roster.running), victim.request_id
        preempt(victim)

    roster.preempt = checked


def run(engine, runner, arrivals, aborts):
    """Rows of the requests that are no fillers, step by step, and all events."""
    rows, events = [], {}
    for step in range(3000):
        for message in arrivals.get(step, ()):
            engine.add(message)
        engine.abort(aborts.get(step, []))
        seen = len(runner.plans)
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        planned = [row for plan in runner.plans[seen:] for row in plan.rows]
        rows.append(
            [(r.request_id, r.num_computed, r.num_new) for r in planned if "f" not in r.request_id]
        )
        if step > 14 and not engine.has_work():
            engine.close()
            return rows, events
    raise AssertionError("still at work")


def arrivals_of(load, name, make):
    arrivals, aborts = {}, {}
    for i, (num, most, priority, arrival, abort) in enumerate(load):
        prompt = [2 + (i * 7 + j) % 40 for j in range(num)]
        message = make(f"{name}{i}", prompt, max_tokens=most, priority=priority)
        arrivals.setdefault(arrival, []).append(message)
        if abort is not None and abort >= arrival:
            aborts.setdefault(abort, []).append(f"{name}{i}")
    return arrivals, aborts


@settings(max_examples=60, deadline=None)
@given(
    load=loads,
    behind=loads,
    overlap=st.booleans(),
    chunked=st.booleans(),
    caching=st.booleans(),
    policy=st.sampled_from(POLICIES),
    num_blocks=st.sampled_from([12, 18, 64]),
    budget=st.sampled_from([3, 16, 64]),
    num_seqs=st.sampled_from([1, 3, 8]),
)
def test_all_get_their_tokens_and_fillers_are_preempted_first(
    load, behind, overlap, chunked, caching, policy, num_blocks, budget, num_seqs
):
    arrivals, aborts = arrivals_of(load, "r", request)
    more, more_aborts = arrivals_of(behind, "f", filler)
    engine, runner = engine_of(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=min(num_seqs, budget),
        max_model_len=44,
        overlap=overlap,
        chunked_prefill=chunked or budget < 64,
        prefix_caching=caching,
        policy=policy,
    )
    watch(engine)
    both = {step: [*more.get(step, ()), *arrivals.get(step, ())] for step in range(15)}
    ends = {step: [*more_aborts.get(step, ()), *aborts.get(step, ())] for step in range(15)}
    _, events = run(engine, runner, both, ends)
    aborted = {name for names in ends.values() for name in names}
    for message in (m for messages in both.values() for m in messages):
        if message.request_id not in aborted:
            assert tokens_of(events[message.request_id]) == expected(message, 44)
    assert engine.stats().kv_usage == 0


@settings(max_examples=60, deadline=None)
@given(
    load=loads,
    behind=loads,
    chunked=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_blocks=st.sampled_from([12, 18, 64]),
    budget=st.sampled_from([3, 16, 64]),
    num_seqs=st.sampled_from([1, 3, 8]),
)
def test_fillers_change_no_step_of_the_others(
    load, behind, chunked, policy, num_blocks, budget, num_seqs
):
    """Without what both may share, a prefix cache and a step in flight, to the row."""
    arrivals, aborts = arrivals_of(load, "r", request)
    more, _ = arrivals_of(behind, "f", filler)
    found = []
    for extra in ({}, more):
        engine, runner = engine_of(
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            max_num_seqs=min(num_seqs, budget),
            max_model_len=44,
            overlap=False,
            chunked_prefill=chunked or budget < 64,
            prefix_caching=False,
            policy=policy,
        )
        both = {s: [*extra.get(s, ()), *arrivals.get(s, ())] for s in range(15)}
        rows, _ = run(engine, runner, both, aborts)
        found.append(rows)
    alone, together = found
    assert together[: len(alone)] == alone
    assert not any(together[len(alone) :])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("short_of", ["places", "blocks"])
def test_a_request_is_let_in_at_once_where_fillers_hold_everything(policy, short_of):
    few = {"max_num_seqs": 4} if short_of == "places" else {"num_blocks": 17}
    engine, runner = engine_of(policy=policy, overlap=False, prefix_caching=False, **few)
    fillers = [filler(f"f{i}", range(2, 14), max_tokens=30) for i in range(4)]
    for message in fillers:
        engine.add(message)
    events = {}
    for _ in range(6):
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    assert engine.stats().num_running >= 3
    watch(engine)
    live = request("r", range(20, 36), max_tokens=30)
    engine.add(live)
    for event in engine.step():
        events.setdefault(event.request_id, []).append(event)
    first = runner.plans[-1].rows[0]
    assert (first.request_id, first.num_new) == ("r", 16)
    assert engine.stats().num_preemptions >= 1
    for request_id, more in drain(engine).items():
        events.setdefault(request_id, []).extend(more)
    for message in (live, *fillers):
        assert tokens_of(events[message.request_id]) == expected(message, 64)
    engine.close()


def test_no_filler_yields_to_a_request_that_it_cannot_make_room_for():
    engine, _ = engine_of(num_blocks=13, overlap=False, prefix_caching=False)
    engine.add(request("r0", range(2, 34), max_tokens=12))  # 8 of 12 blocks, 11 in the end
    engine.step()
    engine.add(filler("f", range(2, 6), max_tokens=8))
    engine.step()
    engine.step()
    engine.step()
    assert engine.stats().num_running == 2
    engine.add(request("r1", range(2, 34), max_tokens=2))
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 1)
    assert engine.stats().num_preemptions == 0
    drain(engine)
    engine.close()
