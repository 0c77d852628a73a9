"""The CPU as a device: memory is what the control group leaves, kernels are in
`native_ops.py` or, where those could not be built, `torch_ops.py`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, Backend, ModelSpec, Op, StepFn, WeightIter
from tokenry.backend.contract import Caps, HostBatch, KVPlan, KVSpec, MemoryInfo
from tokenry.backend.ops import OpTable
from tokenry.errors import ConfigError, DeviceOOM
from tokenry_cpu import native, native_ops, torch_ops
from tokenry_cpu.loading import let_go
from tokenry_cpu.memory import cpu_quota, memory_nodes, read_memory, read_peak, reset_peak
from tokenry_cpu.pack_cache import open_cache
from tokenry_cpu.program import recorded

log = logging.getLogger("tokenry.cpu")
NOT_BUILT = (
    "tokenry-cpu was installed without its native kernels (no C++ compiler was found then): plain "
    "torch computes instead, more slowly. Install a compiler, then reinstall tokenry-cpu."
)
VARIABLES = "TOKENRY_CPU_"
KERNELS = ("auto", "native", "torch")
KV_KINDS = ("auto", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOptions:
    """`--backend-option` of this backend.

    threads   threads of one op; 0: as many as this process may run on (affinity and control group).
    kernels   native | torch; auto: the native ones where they were built
    isa       instruction set of the native kernels, as `native.isas()` names them; empty: the best
    pack_cache  directory for packed weights, so that the next start maps them; empty: none
    kv        auto: KV in the model's dtype; int8: in 8 bits, one scale for each token and head
    """

    threads: int = 0
    kernels: str = "auto"
    isa: str = ""
    kv: str = "auto"
    pack_cache: str = ""

    @classmethod
    def parse(cls, options: Mapping[str, str], environ: Mapping[str, str] = {}) -> CpuOptions:
        """Options from strings; what they lack from variables TOKENRY_CPU_<NAME>. Raises
        ConfigError for a name or a value that is none.
        """
        known = {f.name for f in fields(cls)}
        for variable, value in environ.items():
            name = variable.removeprefix(VARIABLES).lower()
            if variable.startswith(VARIABLES) and name not in known:
                raise ConfigError(
                    f"The environment has {variable}; the cpu backend has no option {name!r}, it "
                    f"has {', '.join(sorted(known))}.",
                    mend=f"unset {variable}",
                )
            if variable.startswith(VARIABLES) and value:
                options = {name: value, **options}
        for key in options:
            if key not in known:
                raise ConfigError(
                    f"The cpu backend has no option {key!r}, it has {', '.join(sorted(known))}.",
                    mend="--backend-option threads=N",
                )
        threads, kernels = options.get("threads", "0"), options.get("kernels", "auto")
        if "threads" in options and not (threads.isdecimal() and int(threads) >= 1):
            raise ConfigError(
                f"--backend-option threads={threads}: not a whole number of at least 1.",
                mend="--backend-option threads=4",
            )
        if kernels not in KERNELS:
            raise ConfigError(
                f"--backend-option kernels={kernels}: it is one of {', '.join(KERNELS)}.",
                mend="--backend-option kernels=auto",
            )
        kv = options.get("kv", "auto")
        if kv not in KV_KINDS:
            raise ConfigError(
                f"--backend-option kv={kv}: it is one of {', '.join(KV_KINDS)}.",
                mend="--backend-option kv=int8",
            )
        rest = {name: options[name] for name in ("isa", "pack_cache") if name in options}
        return cls(threads=int(threads), kernels=kernels, kv=kv, **rest)


class CpuBackend(Backend):
    """Runs the core's model eagerly, in this process's memory."""

    caps = Caps(
        dtypes=("float32", "bfloat16", "float16"),
        block_sizes=(16, 32, 64, 128),
        overlap_pays=False,
    )

    def __init__(self, options: CpuOptions, root: Path = Path("/")) -> None:
        self._root = root
        threads = options.threads or usable_threads(root)
        torch.set_num_threads(threads)
        self._kernels: ModuleType = pick_kernels(options)
        self._ops: Mapping[str, Any] = self._kernels.ops()
        self._int8_kv = options.kv == "int8"
        self._pack_cache = options.pack_cache
        self._planning = False
        self._threads = threads
        self._torch_threads = threads  # while the last model is loaded and its memory planned
        if self._kernels is torch_ops and (self._int8_kv or self._pack_cache):
            named = "kv=int8" if self._int8_kv else "pack_cache"
            raise ConfigError(
                f"--backend-option {named} is for the native kernels.",
                mend="leave it out, or --backend-option kernels=native",
            )
        if self._kernels is native_ops:
            native.set_threads(threads)
            native.set_nodes(memory_nodes(root, affinity()))
            # plain torch comes close, but its error function (gelu) and its threads' shares do not
            self.caps = replace(self.caps, batch_invariant=True, quant=native_ops.QUANT)

    def memory(self) -> MemoryInfo:
        """Bytes of the tightest control group, or of the machine."""
        return read_memory(self._root)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed KV, laid out as the kernels want it (`kv_shape`), a tensor per layer.

        The pages come from the kernel as zeros when a block is first written: clearing gigabytes
        here would be most of the start-up. Raises DeviceOOM: the kernel would grant the memory now
        and kill the process when it is touched.
        """
        spec = self._stored(spec)
        need, free = num_blocks * self._block_bytes(spec), self.memory().free
        if need > free:
            raise DeviceOOM(
                f"{num_blocks} KV blocks need {need / 2**30:.2f} GiB, "
                f"{free / 2**30:.2f} GiB is free.",
                mend="--memory-fraction or --max-model-len lower",
            )
        if self._int8_kv:
            log.info("kv=int8: %d blocks in %.3f GiB", num_blocks, need / 2**30)
        shape = self._kernels.kv_shape(spec, num_blocks)
        dtype = getattr(torch, spec.dtype)
        return [lazy_zeros(shape, dtype) for _ in range(spec.num_layers)]

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """Copies made now: nothing here runs later."""
        copies = [t.detach().numpy().copy() for t in tensors]
        return lambda: copies

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """As the base class, with activations from the resident set's peak: what a step needs is
        given back to the kernel by the time it is over. `weights` is all that the process holds.
        """
        before = self.memory().used
        reset = probe is not None and reset_peak(self._root)
        self._planning = True
        try:
            with torch_threads(self._torch_threads):
                plan = super().plan_kv(spec, budget, probe)
        finally:
            self._planning = False
        if self._kernels is native_ops:
            native.library().tk_trim()  # what the probe made leaves holes in the heap
        block_bytes = self._block_bytes(self._stored(spec))
        if not reset and block_bytes == spec.block_bytes:
            return plan
        activations = plan.ledger["activations"]
        if reset:
            activations = max(activations, read_peak(self._root) - before)
        room = plan.ledger["kv"] - (activations - plan.ledger["activations"])
        num_blocks = max(0, room // block_bytes)
        kv = num_blocks * block_bytes
        return KVPlan(
            num_blocks=num_blocks, ledger={**plan.ledger, "activations": activations, "kv": kv}
        )

    def _stored(self, spec: KVSpec) -> KVSpec:
        """The KV as it is held."""
        return replace(spec, dtype="int8") if self._int8_kv else spec

    def _block_bytes(self, stored: KVSpec) -> int:
        """Bytes of one block over all layers, as `alloc_kv` lays it out."""
        dtype: torch.dtype = getattr(torch, stored.dtype)
        elements: int = math.prod(self._kernels.kv_shape(stored, 1))
        return stored.num_layers * elements * dtype.itemsize

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """Which rows attention takes together; the native kernels read the batch as it is."""
        return torch_ops.plan_rows(host) if self._kernels is torch_ops else {}

    def ops(self) -> Mapping[str, Op]:
        """Kernels whose rows do not depend on the batch."""
        return self._ops

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model; with the native kernels its steps become one call each, and one in
        bfloat16 keeps weights and KV in it but computes in float32 between two products.
        """
        if self._kernels is not native_ops:
            return super().build_model(spec, weights, ops)
        linear: native_ops.Linear = self._ops["linear"]
        linear.round_activations = spec.dtype == "bfloat16"
        cache = open_cache(self._pack_cache, spec) if self._pack_cache else None
        if spec.dtype == "bfloat16":
            spec = in_float32(spec) or spec
        linear.cache = cache
        self._torch_threads = 1 if small(spec) else self._threads
        with torch_threads(self._torch_threads):
            step = super().build_model(spec, let_go(weights), ops)
        linear.cache = None
        if cache is not None:
            cache.report()
        return recorded(step, lambda: self._planning)


def in_float32(spec: ModelSpec) -> ModelSpec | None:
    """The spec with float32 between its ops, None where that would hold the weights so as well:
    only the core's own decoders leave their weights to `linear`.
    """
    if not is_decoder(spec):
        return None
    decoder: Any = spec
    wide: ModelSpec = replace(decoder, dtype="float32")
    return wide


def is_decoder(spec: ModelSpec) -> bool:
    """Whether this is one of the core's own decoders: they have a plan."""
    return is_dataclass(spec) and any(f.name == "plan" for f in fields(spec))


SMALL_BYTES = 2 * 2**30
"""Of weights; torch's one thread looks through them in a quarter of a second."""


def small(spec: ModelSpec) -> bool:
    """Whether this is a decoder of the core's, which leaves the work to the kernels, and small."""
    size = int(getattr(spec, "weight_bytes", 0))  # 0: drawn at random, which is much to compute
    return is_decoder(spec) and 0 < size < SMALL_BYTES


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch has so many threads. After each of its operations they wait in a loop for the
    next, on the cores on which the kernels' own threads are to pack: a small model is loaded in a
    third of the time by one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_kernels(options: CpuOptions) -> ModuleType:
    """The module whose kernels run. Raises ConfigError where the options cannot be met."""
    if options.kernels == "torch" or (options.kernels == "auto" and not native.built()):
        if options.isa:
            raise ConfigError(
                f"--backend-option isa={options.isa} is for the native kernels.",
                mend="leave it out, or --backend-option kernels=native",
            )
        if options.kernels == "auto":
            log.warning("%s", NOT_BUILT)
        return torch_ops
    if not native.built():
        raise ConfigError(NOT_BUILT, mend="--backend-option kernels=torch")
    if options.isa and not native.set_isa(options.isa):
        raise ConfigError(
            f"--backend-option isa={options.isa}: this machine runs {', '.join(native.isas())}.",
            mend=f"--backend-option isa={native.isas()[0]}",
        )
    return native_ops


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor whose pages cost nothing until touched, and little then: they are small. Huge
    ones are cleared whole, of all layers in the same step, which then took 30 ms longer.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size)  # shared: small pages also where the system makes all others huge
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def usable_threads(root: Path) -> int:
    """How many threads this process may run at once: its affinity, cut by the control group's
    quota.
    """
    quota = cpu_quota(root)
    return max(1, min(len(affinity()), math.ceil(quota) if quota else 10**6))


def affinity() -> Sequence[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
