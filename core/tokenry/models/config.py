"""What a model is: its config.json, read without transformers.

In: the directory of a model. Out: `ModelConfig`, whole at birth, with one name per thing where the
files of the last years have several. What only one family knows stays in `raw`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenry.errors import ModelLoadError

DTYPES = ("float32", "float16", "bfloat16")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    kind            default | linear | dynamic | yarn | llama3 | longrope
    rotary_dim      how many of a head's dimensions turn
    max_positions   the config's max_position_embeddings
    original        length that the model was trained with before it was stretched
    factors         the scaling's own numbers, as in the file
    """

    kind: str
    theta: float
    rotary_dim: int
    max_positions: int
    original: int
    factors: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The facts of config.json that every decoder has.

    max_context     positions that the model can tell apart (a stretched rope's length)
    ropes           by layer type, or one under "full_attention"; empty where there is no rope
    layer_types     "full_attention" | "sliding_attention" per layer, () where the file has none
    dtype           of the checkpoint; "float32" where the file has none
    source          path of the file, for errors
    raw             the file itself
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    max_context: int
    ropes: Mapping[str, RopeConfig]
    sliding_window: int | None
    layer_types: tuple[str, ...]
    tied: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    source: Path
    raw: Mapping[str, Any]

    def rope(self, layer: int) -> RopeConfig:
        """Of that layer."""
        kind = self.layer_types[layer] if self.layer_types else FULL
        return self.ropes.get(kind) or self.ropes[FULL]

    def window(self, layer: int) -> int | None:
        """The sliding window of that layer, None: it sees everything."""
        kind = self.layer_types[layer] if self.layer_types else FULL
        return self.sliding_window if kind == SLIDING else None


def read_config(path: Path) -> ModelConfig:
    """The config of the model in directory `path`. Raises ModelLoadError that names the file."""
    file = path / "config.json"
    raw = read_json(file, mend="is this the directory of a model? It needs config.json")
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelLoadError(
            f"{file} names no architecture.", mend='add "architectures": ["LlamaForCausalLM"]'
        )
    generation = path / "generation_config.json"
    more = read_json(generation, mend="remove or repair it") if generation.is_file() else {}
    return parse_config(file, str(architectures[0]), raw, more)


def read_json(file: Path, *, mend: str) -> dict[str, Any]:
    """The object in `file`. Raises ModelLoadError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(f"There is no {file}.", mend=mend) from error
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}.", mend=mend) from error
    except ValueError as error:
        raise ModelLoadError(
            f"{file} is not JSON: {error}.", mend="download it again, or repair that line"
        ) from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} holds no JSON object but {type(value).__name__}.", mend=mend)
    return value


def parse_config(
    file: Path, architecture: str, raw: Mapping[str, Any], generation: Mapping[str, Any]
) -> ModelConfig:
    """`ModelConfig` from the two files' contents."""
    get = _Reader(file, raw)
    hidden = get.number("hidden_size", "n_embd")
    heads = get.number("num_attention_heads", "n_head")
    head_dim = get.number("head_dim", default=hidden // heads)
    positions = get.number("max_position_embeddings", "n_positions", default=2048)
    ropes = read_ropes(raw, head_dim, positions)
    window = raw.get("sliding_window")
    return ModelConfig(
        architecture=architecture,
        model_type=str(raw.get("model_type", "")),
        vocab_size=get.number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=get.number("intermediate_size", "n_inner", default=4 * hidden),
        num_layers=get.number("num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=get.number("num_key_value_heads", default=heads),
        head_dim=head_dim,
        norm_eps=float(get.first("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps") or 1e-6),
        activation=str(
            get.first("hidden_activation", "hidden_act", "activation_function") or "silu"
        ),
        max_context=max([positions, *(_stretched(rope) for rope in ropes.values())]),
        ropes=ropes,
        sliding_window=int(window) if window else None,
        layer_types=tuple(raw.get("layer_types") or ()),
        tied=_tied(raw),
        eos_token_ids=_eos(raw, generation),
        dtype=_dtype(raw),
        source=file,
        raw=raw,
    )


class _Reader:
    """Fields by any of their names."""

    def __init__(self, file: Path, raw: Mapping[str, Any]) -> None:
        self._file = file
        self._raw = raw

    def first(self, *names: str) -> Any:
        return next((self._raw[n] for n in names if self._raw.get(n) is not None), None)

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.first(*names)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelLoadError(
                f"{self._file}: {names[0]!r} is {value!r}, it must be a whole number above 0.",
                mend="download the file again, or add the value",
            )
        return value


def read_ropes(raw: Mapping[str, Any], head_dim: int, positions: int) -> dict[str, RopeConfig]:
    """Ropes by layer type, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (before).
    """
    new = raw.get("rope_parameters")
    if isinstance(new, Mapping):
        if all(isinstance(v, Mapping) for v in new.values()) and new:
            return {kind: _rope(raw, v, head_dim, positions) for kind, v in new.items()}
        return {FULL: _rope(raw, new, head_dim, positions)}
    scaling = raw.get("rope_scaling") or {}
    ropes = {FULL: _rope(raw, scaling, head_dim, positions)}
    local = raw.get("rope_local_base_freq")
    if local is not None:  # Gemma 3: the sliding layers have their own base, and are not stretched
        ropes[SLIDING] = _rope(raw, {"rope_theta": local}, head_dim, positions)
    return ropes


def _rope(
    raw: Mapping[str, Any], own: Mapping[str, Any], head_dim: int, positions: int
) -> RopeConfig:
    kind = own.get("rope_type") or own.get("type") or "default"
    share = own.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    original = (
        own.get("original_max_position_embeddings")
        or raw.get("original_max_position_embeddings")
        or positions
    )
    return RopeConfig(
        kind={"su": "longrope", "ntk": "dynamic"}.get(str(kind), str(kind)),
        theta=float(own.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rotary_dim=int(head_dim * share),
        max_positions=positions,
        original=int(original),
        factors=own,
    )


def _stretched(rope: RopeConfig) -> int:
    """Length that a rope reaches where max_position_embeddings may still be the original one."""
    factor = float(rope.factors.get("factor") or 1.0)
    if rope.kind == "yarn":
        return int(rope.original * factor)
    if rope.kind == "dynamic":
        return int(rope.max_positions * factor)
    return 0


_TIED_BY_DEFAULT = ("gemma2", "gemma3_text", "gpt2")


def _tied(raw: Mapping[str, Any]) -> bool:
    """Files written before transformers 5 leave out what is the family's default."""
    default = raw.get("model_type") in _TIED_BY_DEFAULT
    return bool(raw.get("tie_word_embeddings", default))


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End tokens of either file: chat models often name theirs in generation_config.json only."""
    found: list[int] = []
    for value in (generation.get("eos_token_id"), raw.get("eos_token_id")):
        found += value if isinstance(value, list) else [value] if value is not None else []
    return tuple(dict.fromkeys(int(v) for v in found))


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"
