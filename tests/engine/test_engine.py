import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import EOS, OracleRunner, drain, expected, limits, request, tokens_of

from tokenry.engine.core import EngineCore

loads = st.lists(
    st.tuples(
        st.integers(0, 3),  # which shared beginning
        st.integers(1, 25),  # own tokens
        st.integers(0, 12),  # max_tokens
        st.integers(0, 3),  # priority
        st.integers(0, 12),  # arrives at this step
        st.one_of(st.none(), st.integers(0, 14)),  # aborted at this step
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120, deadline=None)
@given(
    load=loads,
    overlap=st.booleans(),
    chunked=st.booleans(),
    caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
    num_blocks=st.sampled_from([12, 18, 64]),
    budget=st.sampled_from([3, 16, 64]),
    penalised=st.booleans(),
)
def test_every_request_gets_its_tokens_whatever_the_engine_does(
    load, overlap, chunked, caching, policy, num_blocks, budget, penalised
):
    chunked = chunked or budget < 64
    settings_ = limits(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=min(8, budget),
        max_model_len=44,
        overlap=overlap,
        chunked_prefill=chunked,
        prefix_caching=caching,
        policy=policy,
    )
    runner = OracleRunner(settings_.block_size)
    engine = EngineCore(settings_, runner)
    shared = [[], list(range(2, 8)), list(range(2, 14)), [5] * 9]
    messages = {}
    aborted = set()
    events = {}
    for step in range(2_000):
        for i, (which, own, max_tokens, priority, arrival, _) in enumerate(load):
            if arrival == step:
                prompt = shared[which] + [2 + (i * 7 + j) % 40 for j in range(own)]
                penalty = 0.5 if penalised and i % 2 else 0.0
                messages[f"r{i}"] = request(
                    f"r{i}",
                    prompt,
                    max_tokens=max_tokens,
                    priority=priority,
                    presence_penalty=penalty,
                )
                engine.add(messages[f"r{i}"])
        for i, (*_, abort) in enumerate(load):
            if abort == step and f"r{i}" in messages:
                engine.abort([f"r{i}"])
                aborted.add(f"r{i}")
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        if step > 14 and not engine.has_work():
            break
    engine.close()
    for request_id, message in messages.items():
        if request_id in aborted:
            continue
        assert tokens_of(events[request_id]) == expected(message, 44), request_id
        assert events[request_id][-1].finish_reason == "length"
    assert engine.stats().kv_usage == 0
    assert runner.most_tokens <= budget or not chunked


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_ends_are_found_at_the_right_token_and_the_extra_one_is_dropped(overlap):
    want = expected(request("x", [7, 8, 9], max_tokens=20))
    stop = want[5]
    engine = EngineCore(limits(overlap=overlap), OracleRunner(4))
    engine.add(request("stop", [7, 8, 9], max_tokens=20, stop_token_ids=(stop,)))
    engine.add(request("eos", [7, 8, 9], max_tokens=20, eos_token_ids=(stop,)))
    engine.add(request("ignore", [7, 8, 9], max_tokens=20, eos_token_ids=(stop,), ignore_eos=True))
    engine.add(
        request(
            "min", [7, 8, 9], max_tokens=20, stop_token_ids=(stop,), min_tokens=want.index(stop) + 2
        )
    )
    events = drain(engine)
    first = want.index(stop) + 1
    assert tokens_of(events["stop"]) == want[:first]
    assert (events["stop"][-1].finish_reason, events["stop"][-1].stop_reason) == ("stop", stop)
    assert tokens_of(events["eos"]) == want[:first]
    assert (events["eos"][-1].finish_reason, events["eos"][-1].stop_reason) == ("stop", None)
    assert tokens_of(events["ignore"]) == want
    assert len(tokens_of(events["min"])) > first


def test_overlap_plans_the_next_step_before_the_last_result_is_known():
    launched, taken = [], []

    class Watching(OracleRunner):
        def run(self, plan):
            wait = super().run(plan)
            launched.append(plan.step)

            def note():
                taken.append((plan.step, len(launched)))
                return wait()

            return note

    engine = EngineCore(limits(overlap=True), Watching(4))
    engine.add(request("a", [3, 4], max_tokens=6))
    drain(engine)
    assert taken[0][0] == 1
    assert [plan.rows[0].num_new for plan in engine._runner.plans] == [2, 1, 1, 1, 1, 1]
    assert len(engine._runner.plans) == 6, "a step was spent on a token after the last"


def test_a_cached_beginning_is_not_computed_again():
    engine = EngineCore(limits(overlap=False), OracleRunner(4))
    prompt = list(range(2, 22))
    engine.add(request("first", prompt))
    drain(engine)
    engine.add(request("again", prompt))
    engine.add(request("salted", prompt, cache_salt="tenant"))
    events = drain(engine)
    assert events["again"][-1].num_cached_tokens == 16  # the last token is always computed
    assert events["salted"][-1].num_cached_tokens == 0
    stats = engine.stats()
    assert stats.prefix_cache_hits == 16


def test_a_preempted_request_resumes_with_the_same_tokens():
    runner = OracleRunner(4)
    engine = EngineCore(limits(num_blocks=14, max_model_len=40, overlap=True), runner)
    messages = [request(f"p{i}", [2 + i] * 9, max_tokens=24) for i in range(4)]
    for message in messages:
        engine.add(message)
    events = drain(engine)
    assert engine.stats().num_preemptions > 0
    for message in messages:
        assert tokens_of(events[message.request_id]) == expected(message)


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_a_step_that_raises_fails_its_requests_and_no_others(overlap):
    runner = OracleRunner(4, fail_at=frozenset({2}))
    engine = EngineCore(limits(overlap=overlap, max_num_seqs=1), runner)
    engine.add(request("doomed", [3] * 6))
    engine.add(request("fine", [4] * 6))
    events = drain(engine)
    assert events["doomed"][-1].finish_reason == "error"
    assert "planted failure in step 2" in events["doomed"][-1].error
    assert tokens_of(events["fine"]) == expected(request("fine", [4] * 6))
    assert engine.stats().step_failures == 1
    engine.add(request("doomed", [3] * 6))
    assert tokens_of(drain(engine)["doomed"]) == expected(request("doomed", [3] * 6))


def test_a_row_with_an_error_fails_alone():
    engine = EngineCore(limits(), OracleRunner(4, bad_rows=frozenset({"nan"})))
    engine.add(request("nan", [3] * 6))
    engine.add(request("fine", [4] * 6))
    events = drain(engine)
    assert events["nan"][-1].error == "NaN logits"
    assert tokens_of(events["fine"]) == expected(request("fine", [4] * 6))


def test_a_request_larger_than_the_cache_is_told_the_figures():
    engine = EngineCore(limits(num_blocks=6, max_model_len=64), OracleRunner(4))
    engine.add(request("large", [3] * 30))
    engine.add(request("grows", [4] * 10, max_tokens=40))
    engine.add(request("fine", [5] * 6))
    events = drain(engine)
    assert (
        "needs 8 KV blocks of 4 tokens for its 30 tokens, the KV cache has 5"
        in events["large"][-1].refusal.message
    )
    assert events["large"][-1].refusal.code == "context_length_exceeded"
    assert events["grows"][-1].finish_reason == "error"
    assert tokens_of(events["fine"]) == expected(request("fine", [5] * 6))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (request("x", []), "no tokens"),
        (request("x", [3] * 64), "maximum context length is 64 tokens"),
    ],
    ids=["empty", "too long"],
)
def test_a_request_that_can_never_run_is_answered_at_once(message, text):
    engine = EngineCore(limits(), OracleRunner(4))
    engine.add(message)
    refusal = drain(engine)["x"][-1].refusal
    assert text in refusal.message
    assert (refusal.param, refusal.status) == ("prompt", 400)


def test_without_chunks_a_preempted_request_comes_back_in_one_step():
    runner = OracleRunner(4)
    settings_ = limits(
        chunked_prefill=False, prefix_caching=False, num_blocks=12, max_num_seqs=4,
        max_num_batched_tokens=32, max_model_len=32,
    )  # fmt: skip
    engine = EngineCore(settings_, runner)
    messages = [request(f"w{i}", [2 + i] * 9, max_tokens=20) for i in range(3)]
    for message in messages:
        engine.add(message)
    events = drain(engine)
    assert engine.stats().num_preemptions > 0
    rows = [row for plan in runner.plans for row in plan.rows]
    assert max(row.num_new for row in rows) > 9, "nobody came back with its answer"
    assert all(row.num_computed == 0 for row in rows if row.num_new > 1)
    assert runner.most_tokens <= 32
    for message in messages:
        assert tokens_of(events[message.request_id]) == expected(message, 32)


def test_prompt_scores_come_whole_across_chunks_and_preemptions():
    runner = OracleRunner(4)
    engine = EngineCore(limits(num_blocks=13, max_num_batched_tokens=5, max_num_seqs=4), runner)
    prompt = list(range(2, 21))
    engine.add(request("warm", prompt))
    drain(engine)
    for i in range(3):
        engine.add(request(f"s{i}", prompt, prompt_logprobs=0, max_tokens=(0, 1, 12)[i]))
    events = drain(engine)
    for i in range(3):
        scored = [e.prompt_logprobs for e in events[f"s{i}"] if e.prompt_logprobs is not None]
        assert [[p.token_ids[0] for p in s] for s in scored] == [prompt[1:]]
    assert tokens_of(events["s0"]) == []
    assert events["s0"][-1].finish_reason == "length"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_starves_under_an_endless_stream_of_others(policy):
    engine = EngineCore(
        limits(policy=policy, max_num_seqs=2, max_num_batched_tokens=8), OracleRunner(4)
    )
    engine.add(request("patient", [9] * 8, max_tokens=4, priority=2))
    served_at = None
    for step in range(4_000):
        while engine._scheduler.num_waiting < 6:
            engine.add(request(f"u{step}-{engine._scheduler.num_waiting}", [4] * 4, max_tokens=3))
        for event in engine.step():
            if event.request_id == "patient" and event.finish_reason:
                served_at = step
        if served_at is not None:
            break
    assert served_at is not None
    engine.close()


def test_under_priority_the_urgent_go_first_and_the_rest_are_preempted_first():
    engine = EngineCore(
        limits(policy="priority", max_num_seqs=1, overlap=False, max_num_batched_tokens=8),
        OracleRunner(4),
    )
    for name, priority in (("low", 5), ("mid", 3), ("high", 0)):
        engine.add(request(name, [6] * 4, max_tokens=2, priority=priority))
    ends = []
    while engine.has_work():
        ends += [e.request_id for e in engine.step() if e.finish_reason]
    assert ends == ["high", "mid", "low"]


def test_waste_on_a_mixed_load_is_below_four_percent():
    rng = random.Random(0)
    settings_ = limits(
        num_blocks=4_000,
        block_size=16,
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )

    class Silent(OracleRunner):
        def _row(self, row):  # at this scale the slots are not simulated
            held = self.held[row.request_id]
            token = 2 + (row.num_computed * 31) % 40
            if row.sample:
                held.tokens.append(token)
            from tokenry.plan import RowResult

            return RowResult(request_id=row.request_id, token_ids=(token,) if row.sample else ())

    engine = EngineCore(settings_, Silent(16))
    waiting = [
        request(
            f"m{i}",
            [rng.randrange(2, 50) for _ in range(int(rng.lognormvariate(5.0, 0.9)) + 1)][:1500],
            max_tokens=int(rng.lognormvariate(4.8, 0.8)) + 1,
        )
        for i in range(300)
    ]
    shares = []
    while waiting or engine.has_work():
        while waiting and engine._scheduler.num_waiting < 16:
            engine.add(waiting.pop())
        engine.step()
        if engine._scheduler.num_running > 8:
            shares.append(engine.kv_waste())
    assert sum(shares) / len(shares) < 0.04


def test_ten_thousand_requests_pass_through():
    settings_ = limits(num_blocks=600, max_num_seqs=64, max_num_batched_tokens=512)
    engine = EngineCore(settings_, OracleRunner(4))
    for i in range(10_000):
        engine.add(request(f"t{i}", [2 + i % 40, 3], max_tokens=1 + i % 3))
    ended = 0
    while engine.has_work():
        ended += sum(e.finish_reason == "length" for e in engine.step())
    assert ended == 10_000
    assert engine.stats().kv_usage == 0


def test_requests_aborted_in_the_queue_are_not_kept_behind_a_blocked_head():
    engine = EngineCore(limits(max_num_seqs=1, max_model_len=64), OracleRunner(4))
    engine.add(request("runs", [3] * 6, max_tokens=50))
    engine.step()
    for i in range(1000):
        engine.add(request(f"w{i}", [4] * 6))
    engine.add(request("stays", [5] * 6))
    engine.abort([f"w{i}" for i in range(1000)])
    assert engine._scheduler.num_waiting == 1
    assert engine._scheduler._roster.waiting.num_kept < 32
    engine.check_integrity()
    events = drain(engine)
    assert tokens_of(events["stays"]) == expected(request("stays", [5] * 6))
    assert tokens_of(events["runs"]) == expected(request("runs", [3] * 6, max_tokens=50))


def test_a_used_id_is_refused_and_an_aborted_one_is_free_again():
    engine = EngineCore(limits(), OracleRunner(4))
    engine.add(request("a", [3] * 6, max_tokens=30))
    engine.step()
    engine.add(request("a", [3] * 6))
    assert any(e.refusal and "in use" in e.refusal.message for e in engine.step())
    engine.abort(["a", "unknown"])
    engine.add(request("a", [4] * 6))
    assert tokens_of(drain(engine)["a"]) == expected(request("a", [4] * 6))


def test_resetting_the_prefix_cache_mid_flight_loses_nothing_but_hits():
    engine = EngineCore(limits(overlap=False), OracleRunner(4))
    engine.add(request("a", list(range(2, 20)), max_tokens=10, eos_token_ids=(EOS,)))
    engine.step()
    engine.reset_prefix_cache()
    engine.check_integrity()
    assert tokens_of(drain(engine)["a"]) == expected(
        request("a", list(range(2, 20)), max_tokens=10)
    )
