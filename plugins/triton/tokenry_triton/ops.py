"""The ops of the contract on Triton kernels, for the plugins of NVIDIA and AMD devices.

In: the architecture ("sm_90", "gfx942") and the plugin's options. Out: ops by name; what is not
there is the core's reference op.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenry.backend.base import Op
from tokenry_triton.attention import Attention
from tokenry_triton.launch import arch_of
from tokenry_triton.linear import Linear
from tokenry_triton.moe import Moe
from tokenry_triton.rows import ActMul, RmsNorm, Rope
from tokenry_triton.sample import Sample
from tokenry_triton.tune import Tuner


def triton_ops(
    arch: str, options: Mapping[str, str] | None = None, tuner: Tuner | None = None
) -> Mapping[str, Op]:
    """Ops by name for an architecture.

    options: "deterministic" ("true" or "false", the default): the bits of a row do not depend on
    the batch. Others are the plugin's own. tuner: finds tiles in warm-up; not asked where the mode
    is deterministic, for its tiles hang on the number of rows. Raises BackendError for an
    architecture older than the table's.
    """
    found = arch_of(arch)
    deterministic = (options or {}).get("deterministic", "false") == "true"
    tuner = None if deterministic else tuner
    return {
        "attention": Attention(found, deterministic=deterministic, tuner=tuner),
        "linear": Linear(found, deterministic=deterministic, tuner=tuner),
        "moe": Moe(found, deterministic=deterministic, tuner=tuner),
        "rms_norm": RmsNorm(),
        "rope": Rope(),
        "act_mul": ActMul(),
        "sample": Sample(),
    }
