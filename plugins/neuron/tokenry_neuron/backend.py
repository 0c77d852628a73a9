"""Neuron as a device: static programs over a KV that is planned without asking the device.

Where the device is not here (score 0), the same programs are compiled into the cache and nothing
is read back, so that a machine without it can fill the cache for one that has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, Backend, ModelSpec, Op, Program, StepBatch, StepFn, WeightIter
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
from tokenry.backend.ops import OpTable
from tokenry.errors import BackendError, ConfigError, DeviceOOM
from tokenry_neuron import vendor
from tokenry_neuron.cache import ProgramCache, digest
from tokenry_neuron.ops import KVLayer, neuron_ops, signed_inputs
from tokenry_neuron.options import NeuronOptions
from tokenry_neuron.programs import ProgramMaker

TARGETS = {"NCv3": "trn2", "NCv4": "trn3"}
"""Generation of the cores, as the driver names it -> chip, as the compiler names it."""


class NeuronBackend(Backend):
    """One logical core."""

    caps = Caps(
        input_device=vendor.DEVICE,
        dtypes=("bfloat16", "float32"),
        block_sizes=(32, 64, 128),
        shapes=ShapeRules(
            static=True,
            uniform_q=True,
            kv_axis="per_seq",
            multiple_of={"tokens": 128, "kv_blocks": 4},
        ),
        phases=PhaseRules(mixed=False, max_prefill_seqs=1),
        graphs="aot",
        kv_baked=True,
    )

    def __init__(self, device: DeviceRef, options: NeuronOptions) -> None:
        self._here = device.score > 0
        self._options = options
        cache_dir = options.cache_dir.expanduser()
        variables = {
            "TORCH_NEURONX_NEFF_CACHE_DIR": str(cache_dir / "graphs"),
            "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1",
            "TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY": "1",
        }
        if device.index:
            variables["NEURON_RT_VISIBLE_CORES"] = str(device.index)
        if not self._here:
            variables["TORCH_NEURONX_COMPILE_ONLY"] = "1"
            variables["NEURON_PLATFORM_TARGET_OVERRIDE"] = options.target
        held = vendor.connect(variables)
        if self._here:
            self._check(arch=device.why)
        cache = ProgramCache(cache_dir, Path(held["TORCH_NEURONX_NEFF_CACHE_DIR"]))
        self.programs = ProgramMaker(
            cache, self._common_facts(), require_compiled=options.require_compiled
        )
        self._weight_bytes = 0
        self._model_facts: dict[str, Any] = {}
        self._kv_facts: dict[str, Any] = {}
        self._block_size = self.caps.block_sizes[0]

    def _check(self, arch: str) -> None:
        """Raises ConfigError where the device is not what plan and programs are made for."""
        target = TARGETS.get(arch, self._options.target)
        if target != self._options.target:
            raise ConfigError(
                f"The device is a {target} ({arch}), target is {self._options.target}.",
                mend=f"--backend-option target={target}",
            )
        total, planned = vendor.total_bytes(), self._options.hbm_bytes
        if total < planned:
            raise ConfigError(
                f"Memory is planned for {planned / 2**30:.2f} GiB (target {target}), "
                f"the device has {total / 2**30:.2f} GiB.",
                mend=f"--backend-option hbm_gib={int(total / 2**30 * 100) / 100}",
            )

    def _common_facts(self) -> dict[str, Any]:
        """What every program depends on."""
        return {
            "target": self._options.target,
            "caps": digest(dataclasses.asdict(self.caps)),
            **vendor.versions(),
            **vendor.compiler_settings(),
        }

    # ---- memory -------------------------------------------------------------------------

    def memory(self) -> MemoryInfo:
        """Total as configured, so that a plan is the same everywhere; used as the device says, or
        the weights' size where it is not here.
        """
        total = self._options.hbm_bytes
        used = vendor.used_bytes() if self._here else self._weight_bytes
        return MemoryInfo(total=total, free=max(0, total - used), used=used, exact=self._here)

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """min(budget - weights, kv_fraction * budget), a function of numbers that are known without
        the device (source: the vendor's design note on available memory, SDK 2.33).
        """
        room = min(budget - self._weight_bytes, int(budget * self._options.kv_fraction))
        num_blocks = max(0, room // spec.block_bytes)
        kv = num_blocks * spec.block_bytes
        margin = max(0, budget - self._weight_bytes - kv)  # programs, scratch space, rings
        ledger = {"weights": self._weight_bytes, "margin": margin, "kv": kv}
        return KVPlan(num_blocks=num_blocks, ledger={"activations": 0, "programs": 0, **ledger})

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Per layer a KVLayer of zeros. Raises DeviceOOM."""
        self._block_size = spec.block_size
        self._kv_facts = {"kv": dataclasses.asdict(spec), "num_blocks": num_blocks}
        shape = (num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        try:
            pairs = [
                [torch.zeros(shape, dtype=dtype, device=vendor.DEVICE) for _ in range(2)]
                for _ in range(spec.num_layers)
            ]
        except torch.OutOfMemoryError as error:
            raise DeviceOOM(
                f"No memory for {num_blocks} KV blocks "
                f"({num_blocks * spec.block_bytes / 2**30:.2f} GiB): {error}",
                mend="--backend-option kv_fraction or --memory-fraction lower",
            ) from error
        return [KVLayer(k=k, v=v, block_size=spec.block_size) for k, v in pairs]

    # ---- the model ----------------------------------------------------------------------

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model; what its programs depend on is noted while the weights stream in."""
        shapes: list[str] = []
        step = super().build_model(spec, self._counted(weights, spec.dtype, shapes), ops)
        self._model_facts = {
            "model": digest(dict(spec.config)),
            "architecture": spec.architecture,
            "dtype": spec.dtype,
            "max_model_len": spec.max_model_len,
            "weights": digest(sorted(shapes)),
        }
        return step

    def _counted(
        self, weights: WeightIter, dtype: str, shapes: list[str]
    ) -> Iterator[tuple[str, Tensor]]:
        self._weight_bytes = 0
        for name, tensor in weights:
            self._weight_bytes += tensor.numel() * getattr(torch, dtype).itemsize
            shapes.append(f"{name} {vendor.signature(tensor)}")
            yield name, tensor

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """Block table and slots with -1 for the null block."""
        return signed_inputs(host, self._block_size)

    def ops(self) -> Mapping[str, Op]:
        """Kernels for static graphs."""
        return neuron_ops(self.programs)

    def compile(self, step: Program, example: StepBatch) -> Program:
        """The step for example.bucket, from the cache or compiled now."""
        if not self._kv_facts:
            raise BackendError("The KV must be planned before a program is compiled (kv_baked).")
        return self.programs.step(step, example, {**self._model_facts, **self._kv_facts})

    def compile_count(self) -> int:
        """Programs of this process, with those that the cache had."""
        return self.programs.made

    # ---- waiting ------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait for the device."""
        vendor.device_module().synchronize()

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """As the base class; zeros where no device computed anything."""
        if self._here:
            return super().fetch(tensors)
        return lambda: [torch.zeros(t.shape, dtype=t.dtype).numpy() for t in tensors]
