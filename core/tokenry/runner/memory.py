"""Where every byte goes: does the model fit, how many KV blocks beside it, how long a context, how
many at once.

In: sizes of model and device, limits of the config. Out: a plan with its ledger, or an error with
the figures and the
flag that helps. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenry.backend.base import Backend
from tokenry.backend.contract import KVPlan, KVSpec, MemoryInfo
from tokenry.errors import ConfigError, KVCacheTooSmall

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimits:
    """The config's say on memory; None: as the device allows."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    memory_fraction: float
    kv_cache_bytes: int | None = None
    num_kv_blocks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What was decided; notes are lines for the start-up log."""

    num_blocks: int
    max_model_len: int
    ledger: Mapping[str, int]
    notes: tuple[str, ...]


def check_weights_fit(weight_bytes: int, memory: MemoryInfo, fraction: float) -> None:
    """Raises KVCacheTooSmall before anything is loaded, if the weights alone cannot fit."""
    budget = min(int(memory.total * fraction), memory.used + memory.free)
    if weight_bytes + memory.used <= budget:
        return
    raise KVCacheTooSmall(
        f"The weights need {weight_bytes / GIB:.2f} GiB, "
        f"{max(0, budget - memory.used) / GIB:.2f} GiB of "
        f"{memory.total / GIB:.2f} GiB may be used (fraction {fraction}).",
        mend=f"--memory-fraction higher (now {fraction}), a smaller --dtype, or a smaller model",
    )


def plan_memory(
    backend: Backend,
    spec: KVSpec,
    limits: MemoryLimits,
    *,
    model_len: int,
    probe: Callable[[], None] | None,
    used_before: int = 0,
) -> MemoryPlan:
    """Blocks and context that fit. `model_len` is the longest context that the model knows;
    `used_before` what the device said was used before the weights came: the ledger's `runtime`.
    """
    wanted = limits.max_model_len or model_len
    memory = backend.memory()
    notes = []
    if limits.num_kv_blocks is not None:
        plan = _fixed(memory, spec, limits.num_kv_blocks)
    elif limits.kv_cache_bytes is not None:
        plan = _fixed(memory, spec, limits.kv_cache_bytes // spec.block_bytes)
    else:
        plan = backend.plan_kv(spec, int(memory.total * limits.memory_fraction), probe)
    num_blocks = plan.num_blocks
    useful = 2 * limits.max_num_seqs * -(-wanted // spec.block_size) + 1
    if num_blocks > useful and limits.num_kv_blocks is None and limits.kv_cache_bytes is None:
        notes.append(
            f"the KV cache takes {useful} of the {num_blocks} blocks that fit: twice what "
            f"{limits.max_num_seqs} requests of {wanted} tokens can hold (--max-num-seqs)"
        )
        num_blocks = useful
    ledger = _split({**plan.ledger, "kv": num_blocks * spec.block_bytes}, memory, used_before)
    fits = (num_blocks - 1) * spec.block_size
    if fits >= wanted:
        return MemoryPlan(
            num_blocks=num_blocks, max_model_len=wanted, ledger=ledger, notes=tuple(notes)
        )
    if limits.max_model_len is not None or fits < spec.block_size:
        raise _too_small(spec, limits, wanted, fits, num_blocks)
    notes.append(
        f"max_model_len fitted to {fits} of the model's {wanted}: the KV cache has "
        f"{num_blocks * spec.block_bytes / GIB:.2f} GiB"
    )
    return MemoryPlan(num_blocks=num_blocks, max_model_len=fits, ledger=ledger, notes=tuple(notes))


def with_programs(plan: MemoryPlan, program_bytes: int | None) -> MemoryPlan:
    """The plan after the warm-up: what programs were seen to hold, in place of what was kept."""
    if program_bytes is None:
        return plan
    kept = plan.ledger.get("programs", 0)
    note = f"programs hold {program_bytes / GIB:.3f} GiB, {kept / GIB:.3f} GiB was kept for them"
    ledger = {**plan.ledger, "programs": program_bytes}
    return replace(plan, ledger=ledger, notes=(*plan.notes, note))


def _split(ledger: Mapping[str, int], memory: MemoryInfo, used_before: int) -> Mapping[str, int]:
    """Where a backend gives all that is used as the weights, what was used before them stands by
    itself: on the CPU that is the process with its libraries, mostly more than a small model.
    """
    used = ledger.get("weights", 0)
    if not 0 < used_before < used or abs(used - memory.used) > MIB:
        return ledger
    return {"runtime": used_before, **ledger, "weights": used - used_before}


def _fixed(memory: MemoryInfo, spec: KVSpec, num_blocks: int) -> KVPlan:
    kv = num_blocks * spec.block_bytes
    if kv > memory.free:
        raise KVCacheTooSmall(
            f"{num_blocks} KV blocks need {kv / GIB:.2f} GiB, {memory.free / GIB:.2f} GiB is free.",
            mend="--num-kv-blocks or --kv-cache-bytes lower",
        )
    ledger = {"weights": memory.used, "activations": 0, "programs": 0, "margin": 0, "kv": kv}
    return KVPlan(num_blocks=num_blocks, ledger=ledger)


def _too_small(
    spec: KVSpec, limits: MemoryLimits, wanted: int, fits: int, num_blocks: int
) -> KVCacheTooSmall:
    need = -(-wanted // spec.block_size) * spec.block_bytes
    mends = [f"--max-model-len {fits}"] if fits >= spec.block_size else []
    if limits.num_kv_blocks is None and limits.kv_cache_bytes is None:
        mends.append(f"--memory-fraction higher (now {limits.memory_fraction})")
    else:
        mends.append("--num-kv-blocks or --kv-cache-bytes higher")
    return KVCacheTooSmall(
        f"One {wanted}-token request needs {need / GIB:.3f} GiB of KV cache, "
        f"{max(0, num_blocks - 1) * spec.block_bytes / GIB:.3f} GiB is there "
        f"({max(0, num_blocks - 1)} blocks of {spec.block_size} tokens).",
        mend=", or ".join(mends),
    )


def pick_block_size(wanted: int | None, sizes: Sequence[int]) -> int:
    """Tokens of a block: what is wanted, or the backend's first. Raises ConfigError."""
    if wanted is None:
        return sizes[0]
    if wanted not in sizes:
        raise ConfigError(
            f"--block-size {wanted}: this backend has {', '.join(map(str, sizes))}.",
            mend=f"--block-size {sizes[0]}",
        )
    return wanted
