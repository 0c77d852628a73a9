"""What becomes of a text's hidden rows: which of them are taken, and what is computed of the one
row that is left.

In: a model's directory (config.json, sentence-transformers' modules.json with its folders) and the
user's flags. Out: `PoolingPlan`, which `Head` (head.py) carries out. Knows nothing of requests.

Source of the files' meaning: sentence-transformers, models/Pooling.py and models/Dense.py; of the
defaults where files are silent: its Transformer and CrossEncoder classes, and vLLM's pooler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenry.errors import ConfigError, ModelLoadError
from tokenry.models.config import ENCODERS, ModelConfig, read_json
from tokenry.models.encoder import Method
from tokenry.models.head import ACTIVATIONS, HeadLayer, PoolingPlan
from tokenry.models.reranker import judges, plan_judge

OWN_FILE = "config_sentence_transformers.json"
MODES: Mapping[str, Method] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}
"""1_Pooling/config.json's flags, and its newer one name -> ours."""


def plan_pooling(
    path: Path,
    config: ModelConfig,
    *,
    task: str = "auto",
    method: str = "auto",
    matryoshka: bool = False,
) -> PoolingPlan | None:
    """What the files and the flags say; None: the model only generates.

    task        --task: auto, generate, embed, score, classify, rerank, generate+embed
    method      --pooling: auto, cls, mean, last
    matryoshka  embeddings may be cut though the files do not say so.
    Raises ConfigError for a task that this model cannot do, ModelLoadError for files that ask for
    what we cannot compute.
    """
    kind = _kind(config.architecture)
    _check_task(config.architecture, kind, task, method)
    if kind == "classifier":
        return _classifier(path, config, method)
    named = [name for name, _ in _modules(path)]
    if task == "rerank" or (task in ("auto", "score") and judges(path, config, named)):
        if method not in ("auto", "last"):
            raise ConfigError(f"--pooling {method}: a reranker's answer is at the last token.")
        return plan_judge(path, config)
    modules = (path / "modules.json").is_file()
    if kind == "causal" and (task == "generate" or (task == "auto" and not modules)):
        return None
    return _embedder(path, config, method, matryoshka=matryoshka, causal=kind != "encoder")


def generates(architecture: str, task: str, plan: PoolingPlan | None) -> bool:
    """Whether the model also gives tokens."""
    return plan is None or (_kind(architecture) == "causal" and task == "generate+embed")


def served_len(path: Path, config: ModelConfig) -> int:
    """Longest text that the model was made for: what sentence-transformers' file says, or the
    tokenizer's where that file is silent, and never more than the model has positions.
    """
    length = _read(path / "sentence_bert_config.json").get("max_seq_length")
    if length is None and (path / "modules.json").is_file():
        length = _read(path / "tokenizer_config.json").get("model_max_length")
    return min(config.max_len, length) if isinstance(length, int) and length > 0 else config.max_len


def _kind(architecture: str) -> Literal["causal", "headless", "encoder", "classifier"]:
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    if architecture.startswith(ENCODERS):
        return "encoder"
    return (
        "headless" if architecture.endswith("Model") and "LMHead" not in architecture else "causal"
    )


def _check_task(architecture: str, kind: str, task: str, method: str) -> None:
    served = {
        "causal": ("generate", "embed", "score", "rerank", "generate+embed"),
        "headless": ("embed", "score"),
        "encoder": ("embed", "score"),
        "classifier": ("score", "classify", "rerank"),
    }[kind]
    if task != "auto" and task not in served:
        raise ConfigError(
            f"--task {task}: a {architecture} serves {', '.join(served)}.",
            mend=f"--task {served[0]}, or none",
        )
    if method != "auto" and kind == "causal" and task == "generate":
        raise ConfigError(f"--pooling {method}: with --task generate nothing is pooled.")


# ---- embeddings ------------------------------------------------------------------------------


def _embedder(
    path: Path, config: ModelConfig, method: str, *, matryoshka: bool, causal: bool
) -> PoolingPlan:
    modules = _modules(path)
    head: list[HeadLayer] = []
    found: Method | None = None if method == "auto" else _named(method)
    normalize, width = not modules, config.hidden_size
    pooled = False
    for name, folder in modules:
        if name == "Pooling":
            pooled = True
            found = _method(folder) if found is None else found
        elif name == "Dense" and pooled:
            head.append(_dense(folder, width))
            width = head[-1].out_size
        elif name == "Normalize":
            normalize = True
        elif name != "Transformer":
            raise ModelLoadError(
                f"{path / 'modules.json'} has a module {name}; known, in this order: Transformer, "
                "Pooling, Dense, Normalize.",
                mend="another embedding model",
            )
    notes = _prompt_notes(path)
    if found is None:
        found = "last" if causal else "mean"
        notes += (f"no file says how to pool: {found}, then length 1 (--pooling chooses)",)
    return PoolingPlan(
        task="embed",
        method=found,
        width=width,
        normalize=normalize,
        head=tuple(head),
        matryoshka=_matryoshka(config, allowed=matryoshka),
        notes=notes,
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    return read_json(file) if file.is_file() else {}


def _modules(path: Path) -> list[tuple[str, Path]]:
    """(last part of the class's name, folder) in order; [] without modules.json."""
    file = path / "modules.json"
    if not file.is_file():
        return []
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return [(str(m["type"]).rpartition(".")[2], path / str(m["path"])) for m in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{file} cannot be read: {type(error).__name__}: {error}.", mend="download it again"
        ) from error


def _named(method: str) -> Method:
    """The flag's value."""
    known: Mapping[str, Method] = {"cls": "cls", "mean": "mean", "last": "last"}
    return known[method]


def _method(folder: Path) -> Method:
    """What 1_Pooling/config.json says."""
    raw = read_json(folder / "config.json", mend="download it again, or --pooling")
    mode = raw.get("pooling_mode")  # newer files; older ones have a flag for each
    on = [name for name, value in raw.items() if name.startswith("pooling_mode_") and value]
    on = [mode] if isinstance(mode, str) else on
    if len(on) != 1 or on[0] not in MODES:
        raise ModelLoadError(
            f"{folder / 'config.json'} pools by {', '.join(on) or 'nothing'}; one of cls, mean and "
            "last token can be served.",
            mend="--pooling cls, mean or last, if the model allows it",
        )
    if raw.get("include_prompt") is False:
        raise ModelLoadError(
            f"{folder / 'config.json'}: include_prompt false (the instruction is left out of the "
            "mean) cannot be served.",
            mend="another embedding model",
        )
    return MODES[on[0]]


def _dense(folder: Path, width: int) -> HeadLayer:
    raw = read_json(folder / "config.json", mend="download it again")
    if raw.get("in_features") != width:
        raise ModelLoadError(
            f"{folder / 'config.json'} takes {raw.get('in_features')} values, there are {width}.",
            mend="download the model again",
        )
    name = str(raw.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return HeadLayer(
        name="linear",
        folder=folder,
        in_size=width,
        out_size=int(raw["out_features"]),
        act=_activation(name, folder / "config.json"),
        bias=bool(raw.get("bias", True)),
    )


def _activation(name: str, where: Path) -> str:
    found = name.rpartition(".")[2].lower()
    if found not in ACTIVATIONS:
        raise ModelLoadError(
            f"{where}: the activation {name} is not known; known: {', '.join(ACTIVATIONS)}.",
            mend="another model",
        )
    return found


def _prompt_notes(path: Path) -> tuple[str, ...]:
    """sentence-transformers can put a text before every input; we leave that to the client."""
    file = path / OWN_FILE
    raw = _read(file)
    prompts = {name: text for name, text in (raw.get("prompts") or {}).items() if text}
    if not prompts:
        return ()
    return (
        f"the model was trained with prompts before its texts ({', '.join(sorted(prompts))}, see "
        f"{file.name}); they are the client's to write",
    )


def _matryoshka(config: ModelConfig, *, allowed: bool) -> tuple[int, ...] | None:
    sizes = config.get("matryoshka_dimensions")
    if isinstance(sizes, list) and sizes:
        return tuple(sorted(int(size) for size in sizes))
    return () if allowed or config.get("is_matryoshka") else None


# ---- classifiers and rerankers ---------------------------------------------------------------


def _classifier(path: Path, config: ModelConfig, method: str) -> PoolingPlan:
    for name, _ in _modules(path):
        if name != "Transformer":
            raise ModelLoadError(
                f"{path / 'modules.json'} has a module {name}; a classifier has none but its own "
                "head.",
                mend="another reranker",
            )
    labels = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = tuple(str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0])))
    n = len(names)
    layers, found = _classifier_layers(path, config, n)
    if method not in ("auto", found):
        raise ConfigError(f"--pooling {method}: the classifier of this model reads {found}.")
    return PoolingPlan(
        task="classify",
        method=found,
        width=n,
        normalize=False,
        head=layers,
        act=_classifier_activation(path, config, n),
        labels=names,
    )


def _classifier_layers(
    path: Path, config: ModelConfig, n: int
) -> tuple[tuple[HeadLayer, ...], Method]:
    """The head as the architecture has it in transformers, and the row that it reads."""
    H = config.hidden_size

    def layer(name: str, out: int, act: str = "identity", **more: Any) -> HeadLayer:
        return HeadLayer(name=name, folder=path, in_size=H, out_size=out, act=act, **more)

    family = config.architecture.removesuffix("ForSequenceClassification")
    if family == "Bert":
        return (layer("bert.pooler.dense", H, "tanh"), layer("classifier", n)), "cls"
    if family in ("Roberta", "XLMRoberta", "MPNet"):
        return (layer("classifier.dense", H, "tanh"), layer("classifier.out_proj", n)), "cls"
    if family == "DistilBert":
        return (layer("pre_classifier", H, "relu"), layer("classifier", n)), "cls"
    if family == "ModernBert":
        act = _activation(config.get("classifier_activation", "gelu"), path / "config.json")
        dense = layer(
            "head.dense",
            H,
            act,
            bias=bool(config.get("classifier_bias", False)),
            norm="head.norm",
            norm_eps=config.get("norm_eps", 1e-5),
        )
        found: Method = config.get("classifier_pooling", "cls")
        return (dense, layer("classifier", n)), found
    return (layer("score", n, bias=False),), "last"


def _classifier_activation(path: Path, config: ModelConfig, n: int) -> str:
    """What the files say, else sigmoid for one label and softmax for more."""
    nested = (config.get("sentence_transformers") or {}).get("activation_fn")
    said = nested or config.get("sbert_ce_default_activation_function")
    said = said or _read(path / OWN_FILE).get("activation_fn")
    if said is not None:
        return _activation(str(said), path / "config.json")
    kind = config.get("problem_type")
    if kind == "regression":
        return "identity"
    return "sigmoid" if n == 1 or kind == "multi_label_classification" else "softmax"
