"""What users may give, in the one form that `LLM` works with.

In: one prompt or many, one SamplingParams or many, options under vLLM's names. Out: lists, and
options under ours. Knows no engine and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenry.errors import ConfigError, RequestError
from tokenry.params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": ...} / {"prompt_token_ids": ...}."""
_ALIASES = {
    "gpu_memory_utilization": "memory_fraction",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "num_gpu_blocks_override": "num_kv_blocks",
}
"""vLLM's names for options that mean exactly what ours do."""


def own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options under our names. Raises ConfigError if one comes under both."""
    own: dict[str, Any] = {}
    for name, value in config.items():
        target = _ALIASES.get(name, name)
        if target in own:
            raise ConfigError(
                f"{name} and {target} are the same option.", mend=f"give only {target}"
            )
        own[target] = value
    return own


def as_list(value: Any, where: str) -> list[Any]:
    """A list of what can be gone through. Raises RequestError that names `where`."""
    try:
        return list(value)
    except TypeError:
        what = "None" if value is None else f"a {type(value).__name__}"
        raise RequestError(
            f"{where} is {what}; it must be a text, token ids, or a list of such.", param=where
        ) from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several; a list of ints is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    many: list[Any] = as_list(prompts, "prompts")
    return [many] if many and isinstance(many[0], int) else many


def one_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """One for every prompt. Raises RequestError if there are more or fewer."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sampling_params for {count} prompts.",
            param="sampling_params",
            mend="give one for all, or one per prompt",
        )
    return list(params)
