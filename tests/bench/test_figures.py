import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenry.bench.figures import Spread, Timeline, latencies, latency_table, percentile
from tokenry.bench.serve import arrivals


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_latencies_follow_from_time_stamps():
    timelines = [
        Timeline(sent_s=10.0, token_s=(10.5, 10.6, 10.9), num_prompt=3),
        Timeline(sent_s=11.0, token_s=(11.1,), num_prompt=3),
        Timeline(sent_s=12.0, token_s=(), num_prompt=3, error="refused"),
    ]
    found = latencies(timelines)
    assert found["TTFT"].mean == pytest.approx(0.3)
    assert found["ITL"].mean == pytest.approx(0.2)
    assert found["TPOT"].p50 == pytest.approx(0.2)
    assert found["E2EL"].p99 == pytest.approx(0.1 + 0.99 * 0.8)
    assert latency_table(found).splitlines()[1].split() == ["TTFT", "300.0", "300.0", "496.0"]


def test_one_value_is_its_own_spread():
    assert Spread.of([2.0]) == Spread(mean=2.0, p50=2.0, p99=2.0)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 8.0])
def test_arrivals_keep_the_rate(burstiness):
    times = arrivals(4000, 50.0, burstiness, random.Random(1))
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(50, rel=0.1)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.15)


def test_without_a_rate_all_arrive_at_once():
    assert arrivals(3, 0.0, 1.0, random.Random(0)) == [0.0] * 3
