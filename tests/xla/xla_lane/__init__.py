"""A backend for one check only: the Neuron plugin's kernels, lowered and run by XLA on the host.

XLA is not what the plugin targets, but it is another compiler of static graphs that anybody can
run: what it lowers has static shapes and no value of the host, what it writes in place is written
in place, and what it compiles twice had a value baked in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenry.backend.contract import DeviceRef, hookimpl


@hookimpl
def tokenry_probe() -> DeviceRef:
    """Where torch_xla is, which this environment is for."""
    return DeviceRef(backend="xla", index=0, name="XLA on the host", score=1, why="PJRT_DEVICE=CPU")


@hookimpl
def tokenry_open(device: DeviceRef) -> Any:
    """The backend."""
    if device.backend != "xla":
        return None
    return make()


def make() -> Any:
    """A backend; torch and torch_xla are imported here."""
    import psutil
    import torch
    import torch_xla

    from tokenry.backend.base import KV, Backend, Op, Program, StepBatch
    from tokenry.backend.contract import HostBatch, KVSpec, MemoryInfo
    from tokenry_neuron.backend import NeuronBackend
    from tokenry_neuron.ops import KVLayer, neuron_ops, signed_inputs

    class XlaBackend(Backend):
        """The plugin's rules and kernels; XLA's device, memory and programs."""

        caps = dataclasses.replace(
            NeuronBackend.caps,
            input_device=str(torch_xla.device()),
            dtypes=("float32",),
            graphs="aot",
            kv_baked=False,
        )

        def __init__(self) -> None:
            self._block_size = self.caps.block_sizes[0]
            self._programs = 0

        def memory(self) -> MemoryInfo:
            ram = psutil.virtual_memory()
            return MemoryInfo(
                total=ram.total, free=ram.available, used=psutil.Process().memory_info().rss
            )

        def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
            self._block_size = spec.block_size
            shape = (num_blocks * spec.block_size, spec.num_kv_heads, spec.head_dim)
            dtype, device = getattr(torch, spec.dtype), torch_xla.device()
            made = [
                [torch.zeros(shape, dtype=dtype).to(device) for _ in range(2)]
                for _ in range(spec.num_layers)
            ]
            return [KVLayer(k=k, v=v, block_size=spec.block_size) for k, v in made]

        def attn_inputs(self, host: HostBatch) -> Mapping[str, Any]:
            return signed_inputs(host, self._block_size)

        def ops(self) -> Mapping[str, Op]:
            kernels = dict(neuron_ops(None))  # type: ignore[arg-type]
            del kernels["sample"]  # made of programs by the plugin's own compiler
            return kernels

        def compile(self, step: Program, example: StepBatch) -> Program:
            self._programs += 1

            def run(batch: StepBatch) -> Any:
                out = step(batch)
                torch_xla.sync()
                return out

            return run

        def compile_count(self) -> int:
            return self._programs

        def synchronize(self) -> None:
            torch_xla.sync(wait=True)

        def fetch(self, tensors: Sequence[Any]) -> Callable[[], list[Any]]:
            host = [t.cpu().numpy() for t in tensors]
            return lambda: host

    return XlaBackend()
