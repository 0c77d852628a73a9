"""Beam search and n > 1 in the engine: the right answers whatever the engine does to the beams, and
blocks that are shared, never written by two.
"""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import VOCAB, OracleRunner, drain, expected, limits, request, tokens_of

from tokenry.engine.core import EngineCore
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.plan import RowResult, TokenLogprobs


def likely(tokens, count):
    """The most likely tokens after these and their log-probabilities, all different."""
    scores = []
    for token in range(2, VOCAB):
        digest = hashlib.blake2b(repr((tuple(tokens), token)).encode(), digest_size=4).digest()
        scores.append((-int.from_bytes(digest, "little") / 2**30 - 0.01, token))
    return sorted(scores, reverse=True)[:count]


class BeamRunner(OracleRunner):
    """Tells the candidates that a row's KV gives; what it draws is not always the likeliest."""

    def __init__(self, block_size):
        super().__init__(block_size)
        self.num_candidates = {}

    def _introduce(self, new):
        super()._introduce(new)
        self.num_candidates[new.request_id] = new.num_candidates

    def _row(self, row):
        seen = list(self.held[row.request_id].tokens)
        result = super()._row(row)
        count = self.num_candidates[row.request_id]
        if not (row.sample and count and result.error is None):
            return result
        best = likely(seen, count)
        drawn = best[sum(seen) % 2][1]
        self.held[row.request_id].tokens[-1] = drawn
        entry = TokenLogprobs(
            token_ids=(drawn, *(t for _, t in best)),
            logprobs=(0.0, *(s for s, _ in best)),
            rank=1,
        )
        return RowResult(request_id=row.request_id, token_ids=(drawn,), logprobs=(entry,))


def searched(prompt, width, max_tokens, ends, length_penalty, early):
    """Beam search by its definition: lists of (score, tokens), nothing shared."""
    beams, done = [(0.0, [])], []
    for length in range(1, max_tokens + 1):
        options = [
            (score + s, [*tokens, t])
            for score, tokens in beams
            for s, t in likely([*prompt, *tokens], VOCAB)
        ]
        options.sort(key=lambda o: -o[0])
        options = options[: max(2, 1 + len(ends)) * width]
        over = [o for o in options if o[1][-1] in ends or length == max_tokens]
        first = [o for o in options[:width] if o in over]
        if not (early is True and len(done) == width):
            done += [(score / length**length_penalty, tokens) for score, tokens in first]
            done = sorted(done, key=lambda o: -o[0])[:width]
        beams = [o for o in options if o not in over][:width]
        if not beams:
            break
        if len(done) == width:
            reach = max_tokens if early == "never" and length_penalty > 0 else length
            if early is True or beams[0][0] / reach**length_penalty <= done[-1][0]:
                break
    return [tokens for _, tokens in (done + beams)[:width]]


def sharing(message, source):
    """The message of one more completion of the same prompt."""
    return AddRequest(
        request_id=message.request_id,
        token_ids=message.token_ids,
        params=message.params,
        source=source,
    )


def beam_request(name, prompt, width, **params):
    values = {"n": width, "beam_width": width, "max_tokens": 6, **params}
    return AddRequest(
        request_id=f"{name}#0",
        token_ids=tuple(prompt),
        params=SamplingParams(**values),
        beam_ids=tuple(f"{name}#{i}" for i in range(width)),
    )


SEARCHES = st.lists(
    st.tuples(
        st.integers(1, 17),  # prompt
        st.integers(1, 4),  # width
        st.integers(1, 9),  # max_tokens
        st.sampled_from([0.0, 1.0, 2.0]),
        st.sampled_from([True, False, "never"]),
        st.integers(0, 6),  # arrives at this step
        st.booleans(),  # aborted
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    load=SEARCHES,
    others=st.integers(0, 4),
    gone_at=st.integers(1, 12),
    overlap=st.booleans(),
    caching=st.booleans(),
    forks=st.booleans(),
    num_blocks=st.sampled_from([10, 14, 80]),
    budget=st.sampled_from([3, 16]),
    seqs=st.sampled_from([2, 8]),
    policy=st.sampled_from(["fcfs", "priority", "slo"]),
)
def test_a_search_finds_its_answers_whatever_the_engine_does(
    load, others, gone_at, overlap, caching, forks, num_blocks, budget, seqs, policy
):
    settings_ = limits(
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=min(seqs, budget),
        max_model_len=32,
        overlap=overlap,
        prefix_caching=caching,
        forks=forks,
        policy=policy,
    )
    engine = EngineCore(settings_, BeamRunner(4))
    ends = (7, 8, 9, 10, 11)
    wanted, plain, events = {}, {}, {}
    for step in range(3_000):
        for i, (length, width, most, penalty, early, arrival, gone) in enumerate(load):
            if arrival == step:
                prompt = [2 + (i + j) % 9 for j in range(length)]
                engine.add(
                    beam_request(
                        f"b{i}",
                        prompt,
                        width,
                        max_tokens=most,
                        stop_token_ids=ends,
                        length_penalty=penalty,
                        early_stopping=early,
                    )
                )
                if not gone:
                    wanted[f"b{i}"] = searched(prompt, width, most, ends, penalty, early)
            if gone and step == arrival + 3:
                engine.abort([f"b{i}#0"])
        if step < others:
            one = request(f"r{step}", range(3, 14), max_tokens=9, seed=step)
            plain[f"r{step}"] = sharing(one, "r0" if step else None)
            engine.add(plain[f"r{step}"])
        if step == gone_at and plain.pop("r0", None):
            engine.abort(["r0"])
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        if step > 9 and not engine.has_work():
            break
    engine.close()
    for name, answers in wanted.items():
        got = [tokens_of(events[f"{name}#{i}"]) for i in range(len(answers))]
        assert got == answers, name
    for name, message in plain.items():
        assert tokens_of(events[name]) == expected(message)
    assert engine.stats().kv_usage == 0
    assert not engine._scheduler._roster.groups
    assert not engine._scheduler._roster.held


def most_blocks(engine):
    """Drain; the most blocks that were held at once."""
    most = 0
    while engine.has_work():
        engine.step()
        engine.check_integrity()
        most = max(most, engine._scheduler.blocks.num_held)
    return most


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "not cached"])
def test_beams_hold_the_prompt_once(caching):
    engine = EngineCore(limits(overlap=False, prefix_caching=caching), BeamRunner(4))
    engine.add(beam_request("b", range(2, 42), 4, max_tokens=8))
    # 10 full blocks of prompt; 8 tokens more are at most 3 blocks for each of 4 beams
    assert most_blocks(engine) <= 10 + 4 * 3


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "not cached"])
def test_completions_of_one_prompt_hold_it_once_and_compute_it_once(caching, overlap):
    runner = OracleRunner(4)
    engine = EngineCore(limits(overlap=overlap, prefix_caching=caching), runner)
    for i in range(4):
        message = request(f"r#{i}", range(2, 42), max_tokens=8, seed=i)
        source = "r#0" if i else None
        engine.add(sharing(message, source))
    assert engine.stats().num_waiting == 4
    assert most_blocks(engine) == 9 + 4 * 3  # the last block of the prompt is each one's own
    computed = sum(plan.num_tokens for plan in runner.plans)
    # the prompt once; of it each other computes the last block's 4 tokens; 7 of 8 drawn tokens
    assert computed == 40 + 3 * 4 + 4 * 7


def test_without_forks_nobody_waits_for_another():
    runner = OracleRunner(4)
    engine = EngineCore(limits(forks=False, prefix_caching=False), runner)
    for i in range(2):
        one = request(f"r#{i}", range(2, 42), max_tokens=3, seed=i)
        engine.add(sharing(one, "r#0"))
    drain(engine)
    assert sum(plan.num_tokens for plan in runner.plans) == 2 * (40 + 2)


def test_an_aborted_or_failed_first_completion_frees_those_that_waited_for_it():
    for failing in (False, True):
        bad = frozenset({"r#0"}) if failing else frozenset()
        engine = EngineCore(limits(), OracleRunner(4, bad_rows=bad))
        for i in range(3):
            one = request(f"r#{i}", range(2, 22), max_tokens=3, seed=i)
            engine.add(sharing(one, "r#0" if i else None))
        if not failing:
            engine.abort(["r#0"])
        engine.abort(["r#2"])
        events = drain(engine)
        assert len(tokens_of(events["r#1"])) == 3
        assert "r#2" not in events


def test_a_failed_beam_is_the_searchs_error():
    class Failing(BeamRunner):
        def _row(self, row):
            if row.num_computed > 12:
                return RowResult(request_id=row.request_id, error="NaN logits")
            return super()._row(row)

    engine = EngineCore(limits(), Failing(4))
    engine.add(beam_request("b", range(2, 12), 3, max_tokens=8))
    events = drain(engine)
    assert [e.error for e in events["b#0"]] == ["NaN logits"]
    assert engine.stats().kv_usage == 0


def test_an_id_of_a_search_is_in_use_while_it_runs():
    engine = EngineCore(limits(), BeamRunner(4))
    engine.add(beam_request("b", range(2, 12), 3, max_tokens=8))
    engine.add(request("b#2", [3, 4]))
    events = drain(engine)
    assert "in use" in next(e.error for e in events["b#2"] if e.error)
