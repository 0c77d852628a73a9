"""The ops of the contract on Triton kernels, for the plugins of NVIDIA and AMD devices.

In: the architecture ("sm_90", "gfx942") and the plugin's options. Out: ops by name; what is not
there is the core's reference op.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenry.backend.base import Op
from tokenry_triton.rows import ActMul, RmsNorm, Rope


def triton_ops(arch: str, options: Mapping[str, str] | None = None) -> Mapping[str, Op]:
    """Ops by name for an architecture."""
    return {"rms_norm": RmsNorm(), "rope": Rope(), "act_mul": ActMul()}
