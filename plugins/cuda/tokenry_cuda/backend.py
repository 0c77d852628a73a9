"""A CUDA device, opened: what torch says of it, and whether this torch can use it at all.

In: the probe's DeviceRef, options. Out: `GpuBackend`, which computes. Kernels, captures and memory
are shared with other GPUs of torch's "cuda" type: tokenry_triton.gpu.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokenry.backend.contract import DeviceRef
from tokenry.errors import BackendError
from tokenry_cuda.providers import PROVIDERS
from tokenry_triton.gpu.backend import GpuBackend
from tokenry_triton.gpu.choice import Gpu
from tokenry_triton.gpu.options import GpuOptions

TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
BF16_SM, FP8_SM = 80, 89
"""First compute capabilities with bfloat16 and FP8 products (CUDA C Programming Guide, arithmetic
instructions)."""


def open_device(device: DeviceRef, options: Mapping[str, str]) -> GpuBackend:
    """Raises ConfigError for options, BackendError where this torch cannot use the device."""
    chosen = GpuOptions.parse("cuda", options)
    check_torch(device)
    major, minor = torch.cuda.get_device_capability(device.index)
    sm = 10 * major + minor
    wide = ("bfloat16", "float16", "float32") if sm >= BF16_SM else ("float16", "float32")
    gpu = Gpu(
        backend="cuda",
        index=device.index,
        arch=f"sm_{sm}",
        dtypes=wide,
        fp8="e4m3fn" if sm >= FP8_SM else "none",
        attention=PROVIDERS,
    )
    return GpuBackend(gpu, chosen)


def check_torch(device: DeviceRef) -> None:
    """Raises BackendError with what is wrong: torch's build, its own refusal, the index."""
    if torch.version.cuda is None:
        other = f"for ROCm {torch.version.hip}" if torch.version.hip else "for the CPU only"
        raise BackendError(f"The installed torch {torch.__version__} is {other}.", mend=TORCH)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch's
        count = torch.cuda.device_count()
    except RuntimeError as error:  # "driver too old" and the like, in torch's words
        raise BackendError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot start on {device.name}: "
            f"{str(error).partition(chr(10))[0]}",
            mend="update the driver, or a torch for an older CUDA: pytorch.org/get-started",
        ) from error
    if device.index >= count:
        raise BackendError(
            f"There is no device {device.index}: torch sees {count}.", mend=f"0 to {count - 1}"
        )
