"""What the engine may hand out, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What the engine may hand out.

    num_blocks   0: the model has no KV, and requests need no blocks.
    forks        the device can go on after blocks that another request computed.
    pools_whole  a pooling request needs every token of its prompt computed, not only the last.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool = True
    chunked_prefill: bool = True
    policy: Literal["fcfs", "priority", "slo"] = "fcfs"
    overlap: bool = True
    seed: int = 0
    pools_whole: bool = False
    forks: bool = True

    def __post_init__(self) -> None:
        assert self.chunked_prefill or self.max_num_batched_tokens >= self.max_model_len, (
            "without chunks a step must hold a whole request: a preempted one is computed anew"
        )


@dataclass(slots=True)
class Counters:
    """Totals since the start; owned by Scheduler."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    aborted: int = 0
    steps: int = 0
    step_failures: int = 0
    device_ooms: int = 0
