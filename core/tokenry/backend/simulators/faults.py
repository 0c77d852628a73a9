"""Faults that a simulated device has when it is told to: launches without memory, and its loss.

In: the options `oom_at` and `lost_at`. Out: DeviceOOM, DeviceLost. A launch counts if it has a
request in it (KV outside the null block), so that warm-up does not: the first one is number 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tokenry.backend.base import StepBatch
from tokenry.errors import ConfigError, DeviceLost, DeviceOOM


@dataclass(slots=True)
class Faults:
    """Owned by a SimulatedDevice.

    oom_at    launches that find no memory.
    lost_at   the launch in which the device is lost, as are all after it.
    """

    oom_at: frozenset[int] = frozenset()
    lost_at: int | None = None
    launches: int = field(default=0, init=False)

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Faults:
        """Raises ConfigError for what is no number of a launch."""
        lost = _numbers(options, "lost_at")
        if len(lost) > 1:
            raise ConfigError(
                "--backend-option lost_at is one launch.", mend="--backend-option lost_at=3"
            )
        return cls(oom_at=_numbers(options, "oom_at"), lost_at=next(iter(lost), None))

    def meet(self, batch: StepBatch) -> None:
        """A launch begins. Raises DeviceOOM, DeviceLost."""
        with torch._C.DisableTorchFunction():  # the device itself may look
            if not int(batch.slots.max()):
                return
        self.launches += 1
        if self.lost_at is not None and self.launches >= self.lost_at:
            raise DeviceLost(
                f"The simulated device was lost in launch {self.lost_at}.",
                mend="--backend-option lost_at left out",
            )
        if self.launches in self.oom_at:
            raise DeviceOOM(
                f"The simulated device has no memory for launch {self.launches}, {batch.bucket}.",
                mend="--backend-option oom_at left out",
            )


def _numbers(options: Mapping[str, str], name: str) -> frozenset[int]:
    parts = [part for part in options.get(name, "").split(",") if part]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(
            f"--backend-option {name}={options[name]}: not numbers of launches, from 1 on.",
            mend=f"--backend-option {name}=3,7",
        )
    return frozenset(map(int, parts))
