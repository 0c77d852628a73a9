"""With overlap the plan of a step is made while the step before it runs. What is planned is the
same: the same rows in the same steps where nothing has to wait for a result, and the same tokens
always.

An end is noticed one step late, so blocks come free one step later: where requests wait for blocks,
the steps may differ.
"""

from __future__ import annotations

import random

import pytest
from oracle import OracleRunner, expected, limits, request, tokens_of
from test_golden_plans import crowded, mixed, steady

from tokenry.engine.core import EngineCore


def roomy():
    """Requests of random lengths, in chunks, with shared beginnings, and room for all."""
    rng = random.Random(11)
    arrivals: dict[int, list] = {}
    for i in range(16):
        prompt = [*([9] * rng.choice((0, 8))), *(rng.randrange(2, 50) for _ in range(1 + i * 2))]
        message = request(f"r{i}", prompt, max_tokens=rng.randrange(1, 12), seed=i)
        arrivals.setdefault(rng.randrange(6), []).append(message)
    return {"num_blocks": 400, "max_num_seqs": 16, "max_model_len": 64}, arrivals


LOADS = {
    "steady": lambda: ({}, steady()[2]),
    "roomy": roomy,
    "crowded": lambda: ({"num_blocks": 14, "max_model_len": 40}, crowded()[2]),
    "mixed": lambda: ({"num_blocks": 24, "policy": "priority", "max_num_seqs": 4}, mixed()[2]),
}


def served(name, *, overlap):
    """Rows of each step, and tokens of each request."""
    chosen, arrivals = LOADS[name]()
    runner = OracleRunner(4)
    engine = EngineCore(limits(**chosen, overlap=overlap), runner)
    events: dict[str, list] = {}
    for step in range(500):
        for message in arrivals.get(step, ()):
            engine.add(message)
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
        if step > max(arrivals) and not engine.has_work():
            break
    engine.close()
    rows = [
        [(r.request_id, r.num_computed, r.num_new, r.sample) for r in plan.rows]
        for plan in runner.plans
    ]
    want = {m.request_id: expected(m) for some in arrivals.values() for m in some}
    return rows, {name: tokens_of(e) for name, e in events.items()}, want


@pytest.mark.parametrize("load", ["steady", "roomy"])
def test_steps_have_the_same_rows_with_and_without_overlap(load):
    overlapped, waited = served(load, overlap=True)[0], served(load, overlap=False)[0]
    assert overlapped == waited
    print(f"\n{load}: {len(waited)} steps, {sum(map(len, waited))} rows, the same in both")


@pytest.mark.parametrize("load", LOADS)
def test_tokens_are_the_same_with_and_without_overlap(load):
    _, overlapped, want = served(load, overlap=True)
    _, waited, _ = served(load, overlap=False)
    assert overlapped == waited == want
    print(f"\n{load}: {sum(map(len, want.values()))} tokens of {len(want)} requests, all equal")
