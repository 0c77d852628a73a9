"""The plans of three loads, step by step, as they were when they were last looked at.

A refactoring must not change them. A change that is meant: run this file as a program, read the
diff, commit it.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from oracle import OracleRunner, limits, request

from tokenry.engine.core import EngineCore
from tokenry.plan import StepPlan

GOLDEN = Path(__file__).parents[1] / "golden"


def steady() -> tuple[EngineCore, OracleRunner, dict[int, list]]:
    """Four requests that fit, in two waves, with a shared beginning."""
    shared = list(range(2, 12))
    arrivals = {
        0: [request("a", shared, max_tokens=4), request("b", [9] * 5, max_tokens=6)],
        3: [request("c", [*shared, 40], max_tokens=3), request("d", [7], max_tokens=2)],
    }
    return *_engine(), arrivals


def crowded() -> tuple[EngineCore, OracleRunner, dict[int, list]]:
    """Too many for the memory: preemptions."""
    arrivals = {i: [request(f"p{i}", [2 + i] * 9, max_tokens=20)] for i in range(4)}
    return *_engine(num_blocks=14, max_model_len=40), arrivals


def mixed() -> tuple[EngineCore, OracleRunner, dict[int, list]]:
    """Random lengths, priorities and penalties under the priority policy."""
    rng = random.Random(4)
    arrivals: dict[int, list] = {}
    for i in range(10):
        prompt = [rng.randrange(2, 50) for _ in range(rng.randrange(1, 30))]
        message = request(
            f"m{i}",
            prompt,
            max_tokens=rng.randrange(1, 10),
            priority=rng.randrange(3),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        )
        arrivals.setdefault(rng.randrange(8), []).append(message)
    return *_engine(num_blocks=24, policy="priority", max_num_seqs=4), arrivals


def _engine(**changes: object) -> tuple[EngineCore, OracleRunner]:
    chosen = limits(**changes)
    runner = OracleRunner(chosen.block_size)
    return EngineCore(chosen, runner), runner


def text(plan: StepPlan) -> str:
    """One plan in one line: rows as id[computed+new], blocks added in braces, * where a token is
    drawn.
    """
    parts = [f"forget {name}" for name in plan.forget]
    parts += [
        f"new {n.request_id}({len(n.token_ids)} tokens, cached {list(n.block_ids)})"
        for n in plan.new
    ]
    for row in plan.rows:
        blocks = "{" + ",".join(map(str, row.new_block_ids)) + "}" if row.new_block_ids else ""
        mark = "*" if row.sample else ""
        parts.append(f"{row.request_id}[{row.num_computed}+{row.num_new}]{blocks}{mark}")
    return f"{plan.step}: " + "; ".join(parts)


def trace(load) -> str:
    """All plans of a load."""
    engine, runner, arrivals = load()
    for step in range(500):
        for message in arrivals.get(step, ()):
            engine.add(message)
        engine.step()
        engine.check_integrity()
        if step > max(arrivals) and not engine.has_work():
            break
    engine.close()
    return "\n".join(text(plan) for plan in runner.plans) + "\n"


@pytest.mark.parametrize("load", [steady, crowded, mixed], ids=lambda f: f.__name__)
def test_plans_are_as_they_were(load):
    assert trace(load) == (GOLDEN / f"{load.__name__}.txt").read_text()


if __name__ == "__main__":
    for each in (steady, crowded, mixed):
        (GOLDEN / f"{each.__name__}.txt").write_text(trace(each))
