"""Where every byte of a device would go, and what context and concurrency that leaves.

In: a model's config, a device's figures, the engine's limits. Out: `Plan`. Formulas only; where a
device is at hand, `runner/memory.py` measures instead. One model over several devices is split as
tensor parallelism does: heads, feed-forward, experts and vocabulary are divided, norms are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenry.backend.contract import Bucket, KVSpec
from tokenry.errors import ConfigError
from tokenry.models.config import ModelConfig
from tokenry.planning.devices import DeviceFigures
from tokenry.planning.parameters import parts_of
from tokenry.runner.bucket_grid import make_buckets, maxima
from tokenry.runner.buckets import BucketSettings
from tokenry.runner.shapes import Extent

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MARGIN = 0.02
"""Of the budget, as Backend.plan_kv keeps."""
SAMPLER_BYTES = 32
"""Per logit that is drawn from: logits, scaled, probabilities, sorted, filtered and cumulative
values in float32, ranks in int64 (backend/reference.py, Sample with filters)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the plan is made for. None: as model or device have it."""

    dtype: str
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    memory_fraction: float = 0.9
    graph_memory_fraction: float | None = None
    block_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Of one of `devices` equal devices.

    ledger        bytes by name; sums to the device's memory if all fits.
    num_blocks    KV blocks, the null block among them; block_bytes: of one on this device.
    max_fitting   longest context that one request could have.
    buckets       programs that would be warmed, [] where launches need none.
    read_bytes    weights that a decode step of one request reads.
    """

    device: DeviceFigures
    devices: int
    model_weights: int
    limits: Limits
    max_model_len: int
    ledger: Mapping[str, int]
    block_size: int
    block_bytes: int
    num_blocks: int
    max_fitting: int
    buckets: tuple[Bucket, ...]
    read_bytes: int

    @property
    def fits(self) -> bool:
        """One request of max_model_len tokens, at least."""
        return self.max_fitting >= self.max_model_len

    @property
    def weights_fit(self) -> bool:
        """With what must stand beside them, even without any KV."""
        beside = ("runtime", "weights", "activations", "margin")
        return sum(self.ledger[name] for name in beside) <= self.budget

    @property
    def budget(self) -> int:
        """Bytes of the device that may be used."""
        return int(self.device.memory_bytes * self.limits.memory_fraction)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return max(0, self.num_blocks - 1) * self.block_size

    @property
    def concurrency(self) -> float:
        """Requests of max_model_len tokens that run at once, as far as memory goes."""
        blocks = -(-self.max_model_len // self.block_size)
        return max(0, self.num_blocks - 1) / blocks

    @property
    def decode_floor_s(self) -> float:
        """Seconds that a decode step of one short request takes at least: reading the weights."""
        return self.read_bytes / self.device.bandwidth


def make_plan(model: ModelConfig, device: DeviceFigures, devices: int, limits: Limits) -> Plan:
    """The plan of one device. Raises ConfigError where the model cannot be split so."""
    _check_split(model, devices)
    item = ITEM_BYTES[limits.dtype]
    length = limits.max_model_len or model.max_len
    spec = KVSpec(
        num_layers=model.num_layers,
        num_kv_heads=-(-model.num_kv_heads // devices),
        head_dim=model.head_dim,
        block_size=limits.block_size or device.caps.block_sizes[0],
        dtype=limits.dtype,
    )
    parts = parts_of(model)
    weights = sum(part.on_each(devices, model.num_kv_heads) for part in parts) * item
    budget = int(device.memory_bytes * limits.memory_fraction)
    margin = int(budget * MARGIN)
    free = max(0, budget - device.runtime_bytes - weights - margin)
    fraction = limits.graph_memory_fraction
    fraction = device.graph_memory_fraction if fraction is None else fraction
    most_blocks = int(free * (1 - fraction)) // spec.block_bytes
    extent = _extent(limits, length, spec.block_size, most_blocks)
    buckets = make_buckets(device.caps, extent, BucketSettings())
    activations = activation_bytes(model, devices, limits, spec, buckets)
    rest = max(0, free - activations)
    programs = int(rest * fraction)
    num_blocks = max(0, rest - programs) // spec.block_bytes
    ledger = {
        "runtime": device.runtime_bytes,
        "weights": weights,
        "activations": activations,
        "programs": programs,
        "margin": margin,
        "kv": num_blocks * spec.block_bytes,
    }
    ledger["left free"] = device.memory_bytes - sum(ledger.values())
    final = _extent(limits, length, spec.block_size, num_blocks)
    active = sum(part.active_on_each(devices, model.num_kv_heads) for part in parts)
    return Plan(
        device=device,
        devices=devices,
        model_weights=sum(part.count for part in parts),
        limits=limits,
        max_model_len=length,
        ledger=ledger,
        block_size=spec.block_size,
        block_bytes=spec.block_bytes,
        num_blocks=num_blocks,
        max_fitting=max(0, num_blocks - 1) * spec.block_size,
        buckets=tuple(make_buckets(device.caps, final, BucketSettings())),
        read_bytes=active * item,
    )


def activation_bytes(
    model: ModelConfig, devices: int, limits: Limits, spec: KVSpec, buckets: list[Bucket]
) -> int:
    """Most that a step needs beside weights and KV.

    Per token, of one layer: the residual and its sum (2), normed input and output (2), all of
    hidden_size; queries and attention's output, keys and values of this device; gate, up and
    product of the feed-forward (of each chosen expert). Where programs gather the KV that they
    read, keys and values of one layer for all blocks of the largest program. The sampler's floats
    for every row of logits.
    """
    item = ITEM_BYTES[limits.dtype]
    largest = maxima(buckets) if spec.num_layers and buckets else []
    static = [b for b in largest if b.phase != "decode"]
    tokens = max([limits.max_num_batched_tokens, *(b.tokens for b in static)])
    heads = -(-model.num_heads // devices) + spec.num_kv_heads
    experts = model.get("num_experts") or model.get("num_local_experts", 0)
    chosen = model.get("num_experts_per_tok", 2) if experts else 1
    inner = (
        model.get("moe_intermediate_size", model.intermediate_size)
        if experts
        else (model.intermediate_size)
    )
    per_token = 4 * model.hidden_size + 2 * heads * model.head_dim
    per_token += 3 * chosen * -(-inner // devices)
    gathered = max((_blocks_gathered(b, spec) for b in largest), default=0)
    rows = max([limits.max_num_seqs, *(b.tokens for b in largest if b.logits == "all")])
    return tokens * per_token * item + gathered + rows * model.vocab_size * SAMPLER_BYTES


def _blocks_gathered(bucket: Bucket, spec: KVSpec) -> int:
    """Bytes of the keys and values of one layer that a program of the bucket copies."""
    return bucket.kv_blocks * spec.block_bytes // spec.num_layers


def _extent(limits: Limits, length: int, block_size: int, num_blocks: int) -> Extent:
    return Extent(
        max_seqs=limits.max_num_seqs,
        max_tokens=limits.max_num_batched_tokens,
        max_blocks=-(-length // block_size),
        block_size=block_size,
        total_blocks=max(1, num_blocks),
    )


def _check_split(model: ModelConfig, devices: int) -> None:
    if model.num_heads % devices:
        ways = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ConfigError(
            f"{model.num_heads} attention heads do not divide over {devices} devices.",
            mend=f"x{max((n for n in ways if n <= devices), default=1)} instead",
        )
