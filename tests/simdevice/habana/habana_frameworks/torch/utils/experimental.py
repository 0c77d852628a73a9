"""The device's generation ($SIMDEVICE_GAUDI, 2 or 3) and a tensor's address."""

import enum
import os

import torch


class synDeviceType(enum.IntEnum):  # noqa: N801
    """As the vendor's enum; values by name only."""

    synDeviceGaudi2 = 4  # noqa: N815  # the vendor's spelling
    synDeviceGaudi3 = 5  # noqa: N815


def _get_device_type() -> synDeviceType:
    third = os.environ.get("SIMDEVICE_GAUDI", "2") == "3"
    return synDeviceType.synDeviceGaudi3 if third else synDeviceType.synDeviceGaudi2


def _data_ptr(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()
