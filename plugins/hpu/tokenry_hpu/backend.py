"""The HPU as a device: its options, what it can do, its KV; kernels are in `ops.py`, programs in
`programs.py`, the vendor's names in `vendor.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, Backend, GroupSpec, Op, Program, StepBatch
from tokenry.backend.contract import (
    Caps,
    DeviceRef,
    HostBatch,
    KVPlan,
    KVSpec,
    MemoryInfo,
    PhaseRules,
    ShapeRules,
)
from tokenry.errors import ConfigError
from tokenry_hpu.memory import plan_kv, read_memory
from tokenry_hpu.ops import KVLayer, flat_blocks, hpu_ops
from tokenry_hpu.programs import Programs, Way
from tokenry_hpu.vendor import HCCL, find, load, typed_oom

FP8_MAX = {"e4m3_240": 240.0, "e4m3fn": 448.0}
"""Largest value of torch.float8_e4m3fn on the device: Gaudi 2 computes in a format that ends at 240
(vllm-gaudi extension/ops.py, FP8_MAX).
"""
BLOCK_SIZES = (128, 64, 32, 16)
"""Tokens of a block, best first: a block's keys are one tile of the matrix engine at 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HpuOptions:
    """`--backend-option` of this backend.

    graphs   compile (torch.compile, one program per bucket), hpu_graphs (lazy mode, recorded and
             replayed), none (every kernel on its own, to find errors).
    graph_memory_fraction   of what weights and activations leave, kept for programs, in [0, 1).
    linear   model (the model's dtype) or fp8 (weights and activations quantised as they come).
    recipe_cache   directory where the vendor's compiler keeps recipes for the next start, "": none.
    """

    graphs: Way = "compile"
    graph_memory_fraction: float = 0.1
    linear: str = "model"
    recipe_cache: str = ""

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> HpuOptions:
        """Options from strings. Raises ConfigError for a name or a value that is none."""
        values: dict[str, Any] = dict(options)
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ConfigError(
                f"The hpu backend has no option {unknown[0]!r}, it has {', '.join(known)}.",
                mend="--backend-option graphs=compile",
            )
        _one_of("graphs", values.get("graphs", "compile"), get_args(Way))
        _one_of("linear", values.get("linear", "model"), ("model", "fp8"))
        if "graph_memory_fraction" in values:
            values["graph_memory_fraction"] = _fraction(values["graph_memory_fraction"])
        elif values.get("graphs") == "none":
            values["graph_memory_fraction"] = 0.0
        return cls(**values)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"--backend-option {key}={value}: it is one of {', '.join(known)}.",
            mend=f"--backend-option {key}={known[0]}",
        )


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise ConfigError(
        f"--backend-option graph_memory_fraction={text}: not a number of at least 0 and below 1.",
        mend="--backend-option graph_memory_fraction=0.1",
    )


class HpuBackend(Backend):
    """Runs the core's model as one static program per bucket."""

    def __init__(self, device: DeviceRef, options: HpuOptions) -> None:
        lazy, recipes = options.graphs == "hpu_graphs", options.recipe_cache
        self._vendor = load(os.environ, lazy=lazy, module=device.index, recipes=recipes)
        self._options = options
        self._programs = Programs(self._vendor, options.graphs)
        self._block_size = BLOCK_SIZES[0]
        self.caps = Caps(
            input_device="hpu",
            dtypes=("bfloat16", "float32"),
            fp8="e4m3fn" if device.name == "Gaudi 3" else "e4m3_240",
            block_sizes=BLOCK_SIZES,
            shapes=ShapeRules(
                static=True, uniform_q=True, kv_axis="total", multiple_of={"tokens": 128}
            ),
            phases=PhaseRules(mixed=False, max_prefill_seqs=1),
            # gathering fed-back tokens has a shape per mix of launches, each a recipe of its own
            token_feedback=not lazy,
            graphs="capture" if lazy else "none" if options.graphs == "none" else "aot",
            dist="hccl",
        )

    def memory(self) -> MemoryInfo:
        """Of the device."""
        return read_memory(self._vendor.hpu)

    def synchronize(self) -> None:
        """Launch what lazy mode has gathered, wait for all of it."""
        self._vendor.mark()
        self._vendor.hpu.synchronize()

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """Copies behind what has been launched so far; later work is not waited for."""
        copies = [torch.empty(t.shape, dtype=t.dtype).copy_(t, non_blocking=True) for t in tensors]
        done = self._vendor.hpu.Event()
        done.record()

        def wait() -> list[NDArray[Any]]:
            done.synchronize()
            return [c.numpy() for c in copies]

        return wait

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """With the probe's real peak, and memory kept for programs."""
        kept = self._options.graph_memory_fraction
        return plan_kv(self._vendor.hpu, spec, budget, probe, fraction=kept)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Per layer a `KVLayer`, zeroed. Raises DeviceOOM."""
        self._block_size = spec.block_size
        shape = (num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
        kind = {"dtype": getattr(torch, spec.dtype), "device": self.caps.input_device}
        what = f"{num_blocks} KV blocks ({num_blocks * spec.block_bytes / 2**30:.2f} GiB)"
        with typed_oom(what, "--max-model-len, --max-num-seqs or --memory-fraction lower"):
            return [
                KVLayer(torch.zeros(shape, **kind), torch.zeros(shape, **kind), spec.block_size)
                for _ in range(spec.num_layers)
            ]

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """The flat list of blocks."""
        return flat_blocks(host, self._block_size)

    def ops(self) -> Mapping[str, Op]:
        """The vendor's kernels and flat attention."""
        fp8 = self._options.linear == "fp8"
        return hpu_ops(self._vendor, FP8_MAX[self.caps.fp8] if fp8 else None)

    def compile(self, step: Program, example: StepBatch) -> Program:
        """In the way that was chosen."""
        return self._programs.make(step, example)

    def communicator(self, group: GroupSpec) -> Any:
        """HCCL through torch.distributed."""
        find(HCCL)  # importing it registers the backend
        return super().communicator(group)

    def compile_count(self) -> int:
        """Programs; what sampling with rare parameters makes of small recipes is not among them."""
        return self._programs.made

    def program_bytes(self) -> int | None:
        """What stayed taken when each program had run for the first time."""
        return self._programs.bytes if self._options.graphs != "none" else None
