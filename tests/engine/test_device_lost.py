"""A device that is beyond use ends the engine with its cause; no step is tried again."""

from __future__ import annotations

import pytest
from oracle import OracleRunner, drain, limits, request

from tokenry.engine.core import EngineCore
from tokenry.errors import DeviceLost


class LostRunner(OracleRunner):
    """Its device fails in step 2 and in every one after it, when the result is waited for."""

    def run(self, plan):
        wait = super().run(plan)

        def lost():
            raise DeviceLost("The device failed.", mend="restart")

        return lost if plan.step >= 2 else wait


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "overlapped"])
def test_a_lost_device_ends_the_engine_with_its_cause_and_closing_does_not_hang(overlap):
    engine = EngineCore(limits(overlap=overlap), LostRunner(4))
    engine.add(request("a", [3] * 6))
    with pytest.raises(DeviceLost, match="The device failed"):
        drain(engine)
    engine.close()
