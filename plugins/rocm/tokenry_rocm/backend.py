"""A ROCm device, opened: torch calls it "cuda", so all but the names is tokenry_triton.gpu's.

In: the probe's DeviceRef, options. Out: `GpuBackend`, which computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokenry.backend.contract import DeviceRef
from tokenry.errors import BackendError
from tokenry_rocm.providers import PROVIDERS
from tokenry_triton.gpu.backend import GpuBackend
from tokenry_triton.gpu.choice import Gpu
from tokenry_triton.gpu.options import GpuOptions

TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocm6.4"
FNUZ, OCP = ("gfx940", "gfx941", "gfx942"), ("gfx950", "gfx1200", "gfx1201")
"""FP8 of MI300 ends at 240 and has one zero; later ones have the Open Compute Project's, which
checkpoints use (rocm.docs.amd.com, precision support).
"""


def open_device(device: DeviceRef, options: Mapping[str, str]) -> GpuBackend:
    """Raises ConfigError for options, BackendError where this torch cannot use the device."""
    chosen = GpuOptions.parse("rocm", options)
    if torch.version.hip is None:
        raise BackendError(
            f"The installed torch {torch.__version__} is not for ROCm (PyPI's is not).", mend=TORCH
        )
    count = torch.cuda.device_count()
    if device.index >= count:
        raise BackendError(
            f"There is no device {device.index}: torch sees {count}.",
            mend="HIP_VISIBLE_DEVICES, or a device that is there",
        )
    properties = torch.cuda.get_device_properties(device.index)
    arch = str(properties.gcnArchName).partition(":")[0]  # gfx942:sramecc+:xnack-
    gpu = Gpu(
        backend="rocm",
        index=device.index,
        arch=arch,
        dtypes=("bfloat16", "float16", "float32"),
        fp8="e4m3fnuz" if arch in FNUZ else "e4m3fn" if arch in OCP else "none",
        attention=PROVIDERS,
    )
    return GpuBackend(gpu, chosen)
