"""Small host values on their way to the device, without the wait that torch's own ways have.

Those (`torch.tensor(..., device=)`, a list as an index, `.to(device)`) wait until all that was
launched before has run. The memory is not pinned: a driver may copy what is large aside first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any] | list[int], device: torch.device | str) -> Tensor:
    """The array, or the numbers as int64, on the device when what is launched next needs it."""
    array = np.array(values, np.int64) if isinstance(values, list) else values
    return torch.from_numpy(array).to(device, non_blocking=True)
