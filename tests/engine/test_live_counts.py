"""What the live view counts: who waits, whose prompt is computed, who draws."""

from oracle import OracleRunner, drain, limits, request

from tokenry.engine.core import EngineCore


def test_a_long_prompt_counts_as_prefill_until_its_last_piece():
    runner = OracleRunner(4)
    engine = EngineCore(limits(overlap=False, max_num_batched_tokens=8), runner)
    engine.add(request("long", range(2, 22), max_tokens=3))
    seen = []
    while engine.has_work():
        engine.step()
        stats = engine.stats()
        seen.append((stats.num_running, stats.num_prefilling))
    assert seen[:3] == [(1, 1), (1, 1), (1, 0)], "20 tokens in pieces of 8"
    assert all(prefilling == 0 for _, prefilling in seen[2:])
    drain(engine)
    assert engine.stats().num_prefilling == 0
