"""Requests that wait for their grammar, in the real engine over a runner without a model."""

import itertools

import numpy as np
import pytest

from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.errors import RequestError
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.plan import RowResult, StepResult

EOS = 1


class Matcher:
    """Allows tokens 10, 11, 12, ... in turn, `length` of them."""

    def __init__(self, length):
        self.taken = []
        self.length = length

    def mask(self):
        number = 10 + len(self.taken)
        return lambda: np.array([1 << number], np.int32)

    def accept(self, token):
        assert token == 10 + len(self.taken), "a token that the mask does not have"
        self.taken.append(token)
        return len(self.taken) == self.length


class Compiling:
    def __init__(self, outcome):
        self.outcome = outcome
        self.ready = False

    def done(self):
        return self.ready

    def wait(self, timeout_s):
        assert timeout_s < 1

    def matcher(self):
        if isinstance(self.outcome, RequestError):
            raise self.outcome
        return self.outcome


class Grammars:
    def __init__(self):
        self.started = []
        self.closed = False

    def start(self, wanted):
        bad = wanted.regex == "bad"
        outcome = RequestError("no", param=wanted.param) if bad else Matcher(int(wanted.regex))
        self.started.append(Compiling(outcome))
        return self.started[-1]

    def close(self):
        self.closed = True


class Runner:
    """Draws the lowest token of the mask, else 50; notes how many rows each step had."""

    def __init__(self):
        self.steps = []

    def run(self, plan):
        self.steps.append({row.request_id for row in plan.rows})
        rows = []
        for row in plan.rows:
            tokens = ()
            if row.sample:
                tokens = (50,)
                if row.mask is not None:
                    tokens = (int(row.mask()[0]).bit_length() - 1,)
            rows.append(RowResult(request_id=row.request_id, token_ids=tokens))
        result = StepResult(step=plan.step, rows=tuple(rows))
        return lambda: result


def request(name, regex=None, prompt=8, **params):
    wanted = None if regex is None else {"regex": regex, "param": "guided_regex"}
    values = {"max_tokens": 20, "structured_outputs": wanted, **params}
    return AddRequest(
        request_id=name,
        token_ids=tuple(range(100, 100 + prompt)),
        params=SamplingParams(**values),
        eos_token_ids=(EOS,),
    )


def limits(**values):
    given = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        **values,
    }
    return EngineLimits(**given)


@pytest.fixture(params=[True, False], ids=["overlap", "no overlap"])
def engine(request):
    grammars = Grammars()
    engine = EngineCore(limits(overlap=request.param), Runner(), grammars)
    engine.grammars = grammars
    yield engine
    engine.close()
    assert grammars.closed


def run(engine, most=200):
    """Tokens and the last event of each request."""
    tokens, last = {}, {}
    for _ in range(most):
        if not engine.has_work():
            break
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            last[event.request_id] = event
        engine.check_integrity()
    return tokens, last


def test_others_run_while_a_grammar_is_compiled(engine):
    engine.add(request("bound", "3"))
    engine.add(request("free", max_tokens=4))
    tokens, last = run(engine, most=30)
    assert "bound" not in tokens
    assert last["free"].finish_reason == "length"
    assert engine.stats().num_waiting == 1
    engine.grammars.started[0].ready = True
    tokens, last = run(engine)
    assert tokens["bound"] == [10, 11, 12]
    assert (last["bound"].finish_reason, last["bound"].complete) == ("stop", True)


def test_a_wrong_grammar_is_its_requests_error_and_names_its_field(engine):
    engine.add(request("bad", "bad"))
    engine.add(request("good", "2"))
    for compiling in engine.grammars.started:
        compiling.ready = True
    tokens, last = run(engine)
    assert last["bad"].finish_reason == "error"
    assert last["bad"].refusal.param == "guided_regex"
    assert tokens["good"] == [10, 11]


def test_a_request_is_told_that_it_was_let_in_before_its_first_token(engine):
    engine.add(request("bound", "2"))
    engine.grammars.started[0].ready = True
    first = engine.step()
    assert (first[0].request_id, first[0].token_ids, first[0].finish_reason) == ("bound", (), None)
    run(engine)


def test_an_abort_reaches_a_request_that_waits_for_its_grammar(engine):
    engine.add(request("bound", "2"))
    engine.abort(["bound"])
    assert not engine.has_work()
    engine.grammars.started[0].ready = True
    assert run(engine) == ({}, {})
    assert engine.stats().num_requests_aborted == 1


def test_the_next_row_waits_for_the_token_and_free_requests_overlap(engine):
    engine.add(request("bound", "6"))
    engine.add(request("free", max_tokens=12))
    engine.grammars.started[0].ready = True
    tokens, _ = run(engine)
    assert tokens["bound"] == [10, 11, 12, 13, 14, 15]
    steps = engine._runner.steps
    if engine.limits.overlap:
        assert not any("bound" in a and "bound" in b for a, b in itertools.pairwise(steps))
    free = [i for i, rows in enumerate(steps) if "free" in rows]
    assert free == list(range(free[0], free[0] + 12))  # it never waits for the other


@pytest.mark.parametrize("num_blocks", [9, 12, 64])
@pytest.mark.parametrize("budget", [5, 32])
def test_preempted_and_chunked_requests_keep_their_place(num_blocks, budget):
    grammars = Grammars()
    limit = limits(num_blocks=num_blocks, max_num_batched_tokens=budget)
    engine = EngineCore(limit, Runner(), grammars)
    for i in range(3):
        engine.add(request(f"bound{i}", str(9 + i)))
        engine.add(request(f"free{i}", max_tokens=10))
    for compiling in grammars.started:
        compiling.ready = True
    tokens, last = run(engine, most=2000)
    for i in range(3):
        assert tokens[f"bound{i}"] == list(range(10, 19 + i))
        assert last[f"bound{i}"].finish_reason == "stop"
    if num_blocks == 9:
        assert engine.stats().num_preemptions > 0
    engine.close()


def test_max_tokens_ends_a_bound_answer_too(engine):
    engine.add(request("bound", "9", max_tokens=3))
    engine.grammars.started[0].ready = True
    tokens, last = run(engine)
    assert tokens["bound"] == [10, 11, 12]
    assert (last["bound"].finish_reason, last["bound"].complete) == ("length", False)


def test_an_engine_without_a_compiler_says_so():
    engine = EngineCore(limits(), Runner())
    engine.add(request("bound", "2"))
    _, last = run(engine)
    assert last["bound"].refusal.param == "guided_regex"
    engine.close()
