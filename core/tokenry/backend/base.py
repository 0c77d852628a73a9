"""The base class of every backend: a correct default, if slow, for each method of the contract but
`memory`.

A plugin subclasses `Backend`, sets `caps` and `memory`, and overrides what its device does better.
It imports nothing of the core but `tokenry.backend` (contract, base, reference) and
`tokenry.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.contract import Bucket, Caps, HostBatch, KVPlan, KVSpec, MemoryInfo
from tokenry.errors import DeviceOOM

if TYPE_CHECKING:
    from tokenry.backend.ops import OpTable

KV = Any
"""What `alloc_kv` returned: the core only passes it on; `kv[i]` is handed to layer i's attention
op.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """`HostBatch` as tensors on `caps.input_device`: same names, int32, views of one packed copy.

    token_ids already holds the fed-back tokens (prev_row is applied by the runner before the
    program).
    """

    bucket: Bucket
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    q_start: Tensor
    q_lens: Tensor
    seq_lens: Tensor
    block_table: Tensor
    logit_rows: Tensor
    extra: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleInputs:
    """What the `sample` op needs per row, on the device.

    temperature [R] float32, 0 is greedy     top_k [R] int32, 0 is off     top_p, min_p [R] float32
    uniform [R] float32 in [0, 1): the row's draw, a function of (seed, output position) only
    all_greedy, any_filter: host flags of the batch, fixed for a program; False must always be right
    for the first, True for the second.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    all_greedy: bool = False
    any_filter: bool = True


StepFn = Callable[[StepBatch, KV], Tensor]
"""A model's step: batch and KV -> float32 logits [R, vocab] (token ids [R] int32 if caps.sampling
is "tokens").
"""

Program = Callable[[StepBatch], Tensor]
"""A step bound to its KV, as `compile` takes and gives it."""

WeightIter = Iterable[tuple[str, Tensor]]


class Op(Protocol):
    """One of the seven kernels. Found once at load (`OpTable.resolve`), then a plain call.

    attention(q, k, v, kv_layer, batch, *, scale, window, softcap) -> [T, num_heads * head_dim]
        writes k, v [T, num_kv_heads, head_dim] to batch.slots, then causal attention of q [T,
        num_heads, head_dim] over each request's blocks. window: None or number of most recent
        tokens seen (incl. itself); softcap: None or c in c * tanh(s / c). A layer with sinks
        [num_heads] (one more score per head, which takes its share of the softmax and gives
        nothing) asks `supports(sinks=True)` and passes `sinks=`.
    linear(x [T, in], weights) -> [T, out]           weights: what `pack({"weight": [out, in],
    "bias"?: [out]})` gave rms_norm(x, weight, eps, residual=None) -> y, or (y, x + residual) with a
    residual; fp32 inside rope(q [T, H, D], k [T, KH, D], positions [T], table [max_len, 2, rot/2])
    -> (q, k)   cos, sin; first `rot` dims,
        half-split (GPT-NeoX) order
    act_mul(x [T, 2I], kind) -> [T, I]               kind(x[:, :I]) * x[:, I:]; kind: silu | gelu |
    gelu_tanh moe(x [T, E], router_logits [T, N], weights, *, top_k, renormalize, kind) -> [T, E]
        weights: what `pack({"w13": [N, 2I, E], "w2": [N, E, I]})` gave
        A `linear` with `takes_narrow` true packs 16-bit weights of a wider model as well: it is
        given them as they are stored, not widened first.
    sample(logits [R, V] float32, inputs: SampleInputs) -> [R] int32
        If it also has `checked`, which gives (ids, [R] uint8: 1 where a row's largest logit is
        infinite or one of it NaN), the core asks that and need not look for itself.
    """

    def supports(self, **meta: Any) -> bool:
        """Whether this kernel can do it (dtype, head_dim, window, ...); False: counted fall back to
        the reference.
        """
        ...

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The weights in this kernel's layout and format, once at load.

        `linear` and `moe` of a backend with `caps.quant` also have `quantize(weights, format)`,
        which packs them in one of those formats.
        """
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        ...


class ModelSpec(Protocol):
    """What a backend may know of a model; `torch_step` is the core's own over the given ops."""

    @property
    def architecture(self) -> str:
        """As config.json names it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    @property
    def dtype(self) -> str:
        """Of weights and activations."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def max_model_len(self) -> int:
        """Positions to be served."""

    def torch_step(self, weights: WeightIter, ops: OpTable, caps: Caps) -> StepFn:
        """Build the core's torch model on caps.input_device, load `weights` into it, return its
        step.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """The ranks of a parallel group, `rank` among them."""

    ranks: tuple[int, ...]
    rank: int
    init_method: str


class Backend:
    """A device that is open. Subclass it; `memory` is the one method without a default."""

    caps: Caps = Caps()

    def memory(self) -> MemoryInfo:
        """Bytes of the device now."""
        raise TypeError(
            f"{type(self).__name__} must define memory(): it is the one required method."
        )

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        device = torch.device(self.caps.input_device)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """Start copying to the host; the returned function waits and gives numpy arrays."""
        # copy: on the host, `to` would give the tensor itself, which the next step may overwrite
        copies = [t.detach().to("cpu", non_blocking=True, copy=True) for t in tensors]

        def wait() -> list[NDArray[Any]]:
            self.synchronize()
            return [c.numpy() for c in copies]

        return wait

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """How many blocks fit into `budget` bytes of this device (weights are loaded already).

        `probe` runs the worst-case step on a small KV of its own and frees it; None: plan by
        formula.
        The ledger's weights is memory used before, activations the probe's growth, margin 2 % of
        the budget.
        """
        before = self.memory()
        peak = before.used
        if probe is not None:
            probe()
            self.synchronize()
            peak = max(peak, self.memory().used)
        activations = peak - before.used
        margin = budget // 50
        free = min(budget - before.used, before.free) - activations - margin
        num_blocks = max(0, free // spec.block_bytes)
        return KVPlan(
            num_blocks=num_blocks,
            ledger={
                "weights": before.used,
                "activations": activations,
                "programs": 0,
                "margin": margin,
                "kv": num_blocks * spec.block_bytes,
            },
        )

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed KV: per layer a tensor [2, num_blocks, block_size, num_kv_heads, head_dim]. Raises
        DeviceOOM.
        """
        shape = (2, num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        try:
            return [
                torch.zeros(shape, dtype=dtype, device=self.caps.input_device)
                for _ in range(spec.num_layers)
            ]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise DeviceOOM(
                f"No memory for {num_blocks} KV blocks "
                f"({num_blocks * spec.block_bytes / 2**30:.2f} GiB) on "
                f"{self.caps.input_device}.",
                mend="--max-model-len, --max-num-seqs or --memory-fraction lower",
            ) from error

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """More int32 inputs for this device's attention op, a pure function of the host batch."""
        return {}

    def ops(self) -> Mapping[str, Op]:
        """The kernels that this device has, by name; missing ones are the reference ops."""
        return {}

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The model's step. Override where the device cannot run the core's torch model."""
        return spec.torch_step(weights, ops, self.caps)

    def compile(self, step: Program, example: StepBatch) -> Program:
        """Make `step` a program for example.bucket (capture, ahead of time); the default runs it as
        it is.
        """
        return step

    def communicator(self, group: GroupSpec) -> Any:
        """Collectives of a group of ranks; the default is torch.distributed with caps.dist."""
        import torch.distributed as dist

        if self.caps.dist is None:
            raise TypeError(f"{type(self).__name__} declares no caps.dist.")
        if not dist.is_initialized():
            dist.init_process_group(
                self.caps.dist,
                init_method=group.init_method,
                rank=group.rank,
                world_size=len(group.ranks),
            )
        return dist.new_group(list(group.ranks))

    def compile_count(self) -> int:
        """Programs made so far, so that "no compilation after warm-up" can be tested."""
        return 0

    def program_bytes(self) -> int | None:
        """Bytes of the device that the programs made so far keep, measured; None: not known."""
        return None
