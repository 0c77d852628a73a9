"""Steps of lazy mode, and the set-up calls of an inference process."""

from __future__ import annotations

import simdevice
import torch


def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Closes the recipe gathered since the last mark (lazy mode only)."""
    device = simdevice.current()
    device.mark_step()
    if sync:
        device.synchronize()


def hpu_set_env(*args: object) -> None:
    """Sets variables for the real runtime; nothing here depends on them."""


def hpu_inference_set_env() -> None:
    """Sets variables for the real runtime; nothing here depends on them."""


def hpu_initialize(model: torch.nn.Module, mark_only_scales_as_const: bool = False) -> None:
    """Marks constants for the real graph compiler; there is none here."""
