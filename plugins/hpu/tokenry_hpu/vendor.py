"""Every symbol of the vendor's software that this plugin uses, with its signature and where that is
written.

In: nothing. Out: `SYMBOLS` (data, tests compare it with what is installed), `load` (the vendor's
modules, once), and calls whose form is worth a name. No other file imports `habana_frameworks` or
names `torch.ops.hpu`. Sources: "bridge" is github.com/HabanaAI/gaudi-pytorch-bridge below
python_packages/habana_frameworks/torch (read at the commits of 2025); "vllm-gaudi" is
github.com/vllm-project/vllm-gaudi; "docs" is docs.habana.ai.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenry.errors import BackendError, ConfigError, DeviceOOM

log = logging.getLogger(__name__)
DISTRIBUTION = "habana-torch-plugin"
WHERE = (
    f"{DISTRIBUTION} and its torch are not on PyPI. Intel keeps them in the containers "
    "vault.habana.ai/gaudi-docker, and for bare metal behind habanalabs-installer.sh: "
    "docs.habana.ai, Installation Guide"
)
HABANA = "habana_frameworks.torch"
LAZY = "PT_HPU_LAZY_MODE"
"""docs, Runtime Environment Variables: 0 (default) torch.compile and eager mode, 1 lazy mode. Read
once, when the vendor's library is loaded.
"""
COLLECTIVES = "PT_HPU_ENABLE_LAZY_COLLECTIVES"
"""docs, as above: collectives in HPU graphs."""
HCCL = f"{HABANA}.distributed.hccl"
RECIPES = "PT_HPU_RECIPE_CACHE_CONFIG"
"""docs, as above: directory, whether to empty it first, most megabytes."""
VISIBLE = "HABANA_VISIBLE_MODULES"
"""docs, Multiple Workloads on a Single Docker: comma-separated modules that a process may use."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name of the vendor's: dotted path, parameters as we pass them, where it is written."""

    path: str
    signature: str
    source: str


SYMBOLS = tuple(
    Symbol(*(part.strip() for part in line.split("|")))
    for line in """
habana_frameworks.torch.core.mark_step | (device_str='', sync=False) | docs; bridge core
habana_frameworks.torch.hpu.wrap_in_hpu_graph | (module, asynchronous, disable_tensor_cache, dry_run, max_graphs) | bridge hpu/graphs.py
habana_frameworks.torch.hpu.synchronize | () | bridge hpu/__init__.py
habana_frameworks.torch.hpu.mem_get_info | (device=None) -> (free, total) | bridge hpu/memory.py
habana_frameworks.torch.hpu.max_memory_allocated | (device=None) | bridge hpu/memory.py
habana_frameworks.torch.hpu.reset_peak_memory_stats | (device=None) | bridge hpu/memory.py
habana_frameworks.torch.hpu.Event | (enable_timing=False): record(), synchronize() | bridge hpu/events.py
habana_frameworks.torch.hpu.metrics.metric_localcontext | (name) -> context; stats()[0] is ('TotalNumber', n) | bridge hpu/metrics/metrics.py; vllm-gaudi v1/worker/hpu_worker.py
habana_frameworks.torch.utils.internal.is_lazy | () | bridge utils/internal.py
habana_frameworks.torch.hpex.kernels.FusedSDPA | .apply(q, k, v, attn_mask, dropout_p, is_causal, scale, softmax_mode, recompute_mode) | bridge hpex/kernels/FusedSDPA.py
habana_frameworks.torch.hpex.kernels.apply_rotary_pos_emb | (p, cos, sin, position_ids, offset, mode) | bridge hpex/kernels/RotaryPosEmbeddingHelper.py
habana_frameworks.torch.hpex.kernels.RotaryPosEmbeddingMode | .BLOCKWISE | bridge hpex/kernels/RotaryPosEmbeddingHelper.py
habana_frameworks.torch.hpex.normalization.FusedRMSNorm | .apply(data_in, gamma, eps) | bridge hpex/normalization/FusedRMSNorm.py
habana_frameworks.torch.distributed.hccl | import registers the backend `hccl` | bridge distributed/hccl/__init__.py
torch.ops.hpu.mixture_of_experts | (hidden_states, expert_routing_table, router_weights, w12[], w3[], permuted_weights, activation, experts_min, experts_max) | bridge schema mixture_of_experts.fused_weights
torch.ops.hpu.cast_to_fp8_v2 | (input, scale, stochastic_rounding, is_amax, dtype) -> (y, amax) | bridge schema; vllm-gaudi extension/ops.py dynamic_quant
torch.ops.hpu.fp8_gemm_v2 | (A, trans_A, B, trans_B, D, out_dtype, A_scale_inv, B_scale_inv, bias, accumulate) | bridge schema; vllm-gaudi extension/ops.py apply_fp8_linear_hpu
""".strip().splitlines()  # noqa: E501  # a table: one symbol, one line
)
DYNAMO_BACKEND = "hpu_backend"
"""docs, torch.compile on Gaudi: torch.compile(..., backend="hpu_backend")."""
OOM_WORDS = ("PT_DEVMEM", "Allocation failed for size", "out of memory")
"""In the RuntimeError of a failed allocation: vllm-gaudi docs, calibration, quote "MODULE:PT_DEVMEM
Allocation failed for size::939524096 (896)MB".
"""


@dataclass(frozen=True, slots=True)
class Vendor:
    """What was loaded: the module torch.hpu, the classes and functions of `SYMBOLS`."""

    hpu: Any
    launch: Any
    metrics: Any
    sdpa: Any
    rms_norm: Any
    rotary: Any
    blockwise: Any
    lazy: bool

    def mark(self) -> None:
        """What lazy mode has gathered is one recipe, and starts; nothing in eager mode."""
        if self.lazy:
            self.launch()

    def count_compilations(self) -> Callable[[], int]:
        """How many recipes the vendor's compiler has made since now."""
        counting = self.metrics.metric_localcontext("graph_compilation")
        counter = counting.__enter__()  # for as long as the process lives

        def count(held: Any = counting) -> int:  # given up, it would end
            return int(counter.stats()[0][1])

        return count

    def wrap(self, module: torch.nn.Module) -> Any:
        """`module`, recorded at its first call and replayed from then on (lazy mode only)."""
        return self.hpu.wrap_in_hpu_graph(module, disable_tensor_cache=True)


def load(
    environ: dict[str, str] | os._Environ[str], *, lazy: bool, module: int = 0, recipes: str = ""
) -> Vendor:
    """The vendor's modules, in the mode asked for, on the module (device) of that number.

    Writes what they need into `environ` before they are imported: PT_HPU_LAZY_MODE, the module, the
    directory where compiled recipes are kept. Raises ConfigError if the
    environment says otherwise or they are loaded in the other mode already, BackendError if they
    are not installed.
    """
    wanted, said = str(int(lazy)), environ.get(LAZY)
    if said not in (None, wanted):
        other = "hpu_graphs" if said == "1" else "compile"
        raise ConfigError(
            f"The environment has {LAZY}={said}, the way to run programs that was chosen needs "
            f"{LAZY}={wanted}.",
            mend=f"unset {LAZY}, or --backend-option graphs={other}",
        )
    loaded = said is None and HABANA in sys.modules
    if loaded and find(f"{HABANA}.utils.internal.is_lazy")() != lazy:
        raise ConfigError(
            "habana_frameworks was loaded in the other mode before tokenry opened the device.",
            mend=f"start the process with {LAZY}={wanted} in its environment",
        )
    needs = {LAZY: wanted} | ({COLLECTIVES: "true"} if lazy else {})
    if recipes:
        needs[RECIPES] = f"{recipes},false,16384"
    if module:
        visible = environ.get(VISIBLE, "all")
        needs[VISIBLE] = str(module) if visible == "all" else visible.split(",")[module]
    for name, value in needs.items():
        if environ.get(name) != value:
            environ[name] = value
            log.warning("set %s=%s for the vendor's software", name, value)
    return Vendor(
        hpu=find(f"{HABANA}.hpu"),
        launch=find(f"{HABANA}.core.mark_step"),
        metrics=find(f"{HABANA}.hpu.metrics"),
        sdpa=find(f"{HABANA}.hpex.kernels.FusedSDPA"),
        rms_norm=find(f"{HABANA}.hpex.normalization.FusedRMSNorm"),
        rotary=find(f"{HABANA}.hpex.kernels.apply_rotary_pos_emb"),
        blockwise=find(f"{HABANA}.hpex.kernels.RotaryPosEmbeddingMode").BLOCKWISE,
        lazy=lazy,
    )


def find(path: str) -> Any:
    """The object at a dotted path. Raises BackendError that tells where the vendor keeps it."""
    names = path.split(".")
    value, at = None, 0
    for at in range(len(names), 0, -1):
        module = ".".join(names[:at])
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise BackendError(f"{module} cannot be loaded: {error}.", mend=WHERE) from error
    for name in names[at:] if value is not None else ():
        value = getattr(value, name, None)
    if value is None:
        raise BackendError(f"There is no {path} on this machine.", mend=WHERE)
    return value


@contextlib.contextmanager
def typed_oom(what: str, mend: str) -> Iterator[None]:
    """Raises DeviceOOM, "No memory on the device for {what}", where the device had none left."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        oom = isinstance(error, torch.OutOfMemoryError) or any(w in text for w in OOM_WORDS)
        if not oom:
            raise
        first = text.splitlines()[0] if text else "no more is said"
        raise DeviceOOM(f"No memory on the device for {what}: {first}", mend=mend) from error


def experts(x: Tensor, ids: Tensor, gates: Tensor, weights: Mapping[str, Any], kind: str) -> Tensor:
    """[T, E]: x [T, E] through the experts ids [T, k] int64, weighted with gates [T, k].

    weights: lists of one tensor per expert, w12 [2I, E] (gate, then up) and w3 [E, I].
    """
    y: Tensor = torch.ops.hpu.mixture_of_experts(
        hidden_states=x,
        expert_routing_table=ids,
        router_weights=gates,
        w12=weights["w12"],
        w3=weights["w3"],
        permuted_weights=True,
        activation=kind,
        experts_min=0,
        experts_max=len(weights["w12"]) - 1,
    )
    return y


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Gives x / scale in float8_e4m3fn, saturated; scale broadcasts to x."""
    y: Tensor = torch.ops.hpu.cast_to_fp8_v2(x, 1.0 / scale, False, False, torch.float8_e4m3fn)[0]
    return y


def fp8_gemm(
    x: Tensor, x_scale: Tensor, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """[T, out] in `dtype`: (x * x_scale) @ (weight * scale).T + bias, with one scale per row of x
    [T, 1] and one per row of weight [out].
    """
    y: Tensor = torch.ops.hpu.fp8_gemm_v2(
        A=x,
        trans_A=False,
        B=weights["fp8"],
        trans_B=True,
        D=None,
        out_dtype=dtype,
        A_scale_inv=x_scale,
        B_scale_inv=weights["scale"],
        bias=weights.get("bias"),
        accumulate=False,
    )
    return y
