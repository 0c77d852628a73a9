"""A checkpoint's config.json, read without transformers.

In: a directory. Out: `ModelConfig`, the common facts by one name each, and the raw mapping for what
only one family
has. A missing or malformed file is a ModelLoadError that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenry.errors import ModelLoadError

UNWRITTEN: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma2": {
        "head_dim": 256, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {"activation_function": "gelu_new"},
    "distilbert": {"max_position_embeddings": 512, "activation": "gelu"},
    "mistral": {"sliding_window": 4096},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "mixtral": {"rope_theta": 1e6, "num_local_experts": 8},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3_moe": {"sliding_window": 4096, "moe_intermediate_size": 768},
}  # fmt: skip
"""By model_type: values that published files leave out because they are transformers' defaults."""
DTYPES = ("float32", "float16", "bfloat16")
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "ModernBert", "MPNet")
"""Beginnings of the names of architectures that see a text from both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Facts that every decoder has.

    trained_len    max_position_embeddings. max_len: the longest context it serves, more where the
                   rope is stretched.
    dtype          of the checkpoint.
    raw            the file as it is; for composite models their text part, laid over the rest.
    eos_token_ids  of generation_config.json, else of config.json.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    trained_len: int
    max_len: int
    tied: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    raw: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the file, the default if it is missing or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A field of the file without which nothing can be computed. Raises ModelLoadError."""
        if self.raw.get(name) is None:
            raise ModelLoadError(
                f"config.json of this {self.architecture} has no {name!r}.",
                mend="download config.json again, or repair it",
            )
        return self.raw[name]

    @property
    def rope(self) -> Mapping[str, Any]:
        """`rope_parameters` as transformers 5 writes it, made of `rope_theta` and `rope_scaling` in
        older files.
        """
        parameters = self.get("rope_parameters")
        if parameters is None:
            scaling = dict(self.get("rope_scaling", {}))
            kind = scaling.pop("rope_type", scaling.pop("type", "default"))
            parameters = {
                "rope_type": kind,
                "rope_theta": self.get("rope_theta", 10000.0),
                **scaling,
            }
        rope = dict(parameters)
        share = self.get("partial_rotary_factor")
        return rope if share is None else {"partial_rotary_factor": share, **rope}

    def layer_types(self, default: str = "full_attention") -> tuple[str, ...]:
        """full_attention or sliding_attention, per layer."""
        return tuple(self.get("layer_types", [default] * self.num_layers))


def read_config(path: Path) -> ModelConfig:
    """The config of a checkpoint directory. Raises ModelLoadError."""
    raw = read_json(path / "config.json")
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ModelLoadError(
            f"{path / 'config.json'} names no architecture.",
            mend='add "architectures": ["LlamaForCausalLM"] (or whichever it is)',
        )
    text = raw.get("text_config")
    merged = {**raw, **text} if isinstance(text, dict) else raw
    merged = {**UNWRITTEN.get(str(merged.get("model_type")), {}), **merged}
    try:
        return _config(str(architectures[0]), merged, _eos(path, merged))
    except (TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{path / 'config.json'}: {error}.", mend="download config.json again, or repair it"
        ) from error


def _config(architecture: str, raw: Mapping[str, Any], eos: tuple[int, ...]) -> ModelConfig:
    def number(*names: str, default: int | None = None) -> int:
        value = next((raw[name] for name in names if raw.get(name) is not None), default)
        if type(value) is not int or value < 1:
            said = "is missing" if value is None else f"is {value!r}, not a number above 0"
            raise ValueError(f"{names[0]!r} {said}")
        return value

    hidden = number("hidden_size", "n_embd", "d_model", "dim")
    heads = number("num_attention_heads", "n_head", "num_heads", "n_heads")
    trained_len = number("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=number("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        intermediate_size=number("intermediate_size", "n_inner", "hidden_dim", default=4 * hidden),
        vocab_size=number("vocab_size"),
        trained_len=trained_len,
        max_len=_stretched(raw, trained_len) - _unused_positions(architecture, raw),
        tied=bool(raw.get("tie_word_embeddings", _tied_by_default(architecture))),
        dtype=dtype if dtype in DTYPES else "float32",
        eos_token_ids=eos,
        raw=raw,
    )


def _stretched(raw: Mapping[str, Any], length: int) -> int:
    """What a stretched rope serves; max_position_embeddings often stays at the original length."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor") or 1.0
    if kind == "yarn":
        return max(length, int(rope.get("original_max_position_embeddings", length) * factor))
    return int(length * factor) if kind == "dynamic" else length


def _unused_positions(architecture: str, raw: Mapping[str, Any]) -> int:
    """Positions before a text's first token: RoBERTa and MPNet begin after the padding's."""
    if architecture.startswith("MPNet"):
        return 2
    roberta = architecture.startswith(("Roberta", "XLMRoberta"))
    return int(raw.get("pad_token_id") or 0) + 1 if roberta else 0


def _tied_by_default(architecture: str) -> bool:
    """What transformers assumes where the file is silent (it writes only what differs from the
    default).
    """
    return architecture.startswith(("Gemma", "GPT2"))


def _eos(path: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    generation = path / "generation_config.json"
    source = read_json(generation) if generation.exists() else {}
    value = source.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def read_json(path: Path, *, mend: str = "name a directory that holds a model") -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"There is no {path.name} in {path.parent}.", mend=mend) from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{path} cannot be read as JSON: {error}.", mend="download it again, or repair it"
        ) from error
    if not isinstance(data, dict):
        raise ModelLoadError(
            f"{path} holds a {type(data).__name__}, not an object.", mend="download it again"
        )
    return data
