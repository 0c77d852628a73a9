"""What a key's requests get without asking for it: targets and a priority."""

import pytest

from tokenry.api.caller import Caller, targets_of
from tokenry.api.keys import Key, digest
from tokenry.api.limits import Limits
from tokenry.errors import RequestError
from tokenry.params import SamplingParams


def caller(headers=None, **limits):
    key = Key(name="k", sha256=digest("k"), **limits)
    return Caller(account=Limits().account(key), targets=targets_of(headers or {}, key))


def test_the_bodys_targets_win_over_the_headers_and_those_over_the_keys():
    sender = caller({"x-slo-tpot-ms": "40"}, ttft_ms=500, tpot_ms=50, deadline_ms=9000)
    params = sender.with_targets(SamplingParams(deadline_ms=3000))
    told = (params.ttft_target_ms, params.tpot_target_ms, params.deadline_ms)
    assert told == (500, 40, 3000)
    assert Caller().with_targets(params) is params


def test_a_keys_requests_may_wait_longer_than_it_but_never_less():
    sender = caller(priority=-5)
    assert sender.priority(0) == -5
    assert sender.priority(7) == 2
    with pytest.raises(RequestError) as caught:
        sender.priority(-1)
    assert caught.value.param == "priority"
    assert caller().priority(-9) == -9
    assert Caller().priority(3) == 3
