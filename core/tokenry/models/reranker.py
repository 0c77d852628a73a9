"""A decoder that judges a document by its next token: P(yes) of "yes" and "no", as Qwen3-Reranker.

In: a model's directory. Out: `PoolingPlan`: a classifier of one label, whose weight is the
difference of two rows of the model's output matrix. So nothing but the last token's hidden row is
taken from a step, and no logits of the vocabulary are computed. Knows nothing of requests.

Source of the prompt and the score: the model card of Qwen3-Reranker-0.6B (process_inputs and
compute_logits); softmax over two logits is the sigmoid of their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from tokenry.errors import ConfigError, ModelLoadError
from tokenry.models.config import ModelConfig, read_json
from tokenry.models.head import HeadLayer, PoolingPlan
from tokenry.pooling import PairTemplate

ARCHITECTURES = ("Qwen3ForCausalLM",)
HUB_FOLDER = "models--"
"""With it begins a repository's folder in the hub's cache; its revisions lie deeper."""
MODULE = "LogitScore"
"""sentence-transformers' name of such a model's last module."""
NO, YES = "no", "yes"
TEMPLATE = PairTemplate(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    ),
    before_instruction="<Instruct>: ",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    before_first="\n<Query>: ",
    before_second="\n<Document>: ",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
_NEEDED = (NO, YES, "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Each must be one token: else the model was not trained with this prompt."""


def judges(path: Path, config: ModelConfig, modules: Sequence[str]) -> bool:
    """Whether the files of a text model, or the name of its directory or repository, say that it is
    such a reranker.
    """
    if config.architecture not in ARCHITECTURES:
        return False
    names = [path.name, *(part for part in path.parts if part.startswith(HUB_FOLDER))]
    named = any("qwen3-reranker" in name.lower() for name in names) and not modules
    return named or MODULE in modules or config.get("classifier_from_token") == [NO, YES]


def plan_judge(path: Path, config: ModelConfig) -> PoolingPlan:
    """The plan. Raises ConfigError for another architecture, ModelLoadError for files that ask for
    another prompt or other tokens.
    """
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"--task rerank: a {config.architecture} is not asked for yes or no; "
            f"{', '.join(ARCHITECTURES)} (Qwen3-Reranker) is.",
            mend="an encoder or ...ForSequenceClassification reranks without --task",
        )
    no, yes = _answers(path)
    said = _said(path)
    if said not in (None, (no, yes)):
        raise ModelLoadError(
            f"{path}: {MODULE} reads the tokens {said}; of such rerankers only those are served "
            f"that compare no and yes ({no} and {yes}) after Qwen3-Reranker's prompt.",
            mend="--task generate, or a ...ForSequenceClassification reranker",
        )
    return PoolingPlan(
        task="classify",
        method="last",
        width=1,
        normalize=False,
        head=(
            HeadLayer(
                name="model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head",
                folder=path,
                in_size=config.hidden_size,
                out_size=1,
                bias=False,
                rows=(no, yes),
            ),
        ),
        act="sigmoid",
        labels=(YES,),
        template=TEMPLATE,
        notes=("a pair's score is P(yes) after Qwen3-Reranker's prompt",),
    )


def _answers(path: Path) -> tuple[int, int]:
    """Token ids of no and yes."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelLoadError(
            f"There is no {file}, in which yes and no are looked up.", mend="download it"
        )
    core = tokenizers.Tokenizer.from_file(str(file))
    missing = [token for token in _NEEDED if core.token_to_id(token) is None]
    no, yes = core.token_to_id(NO), core.token_to_id(YES)
    if missing or no is None or yes is None:
        raise ModelLoadError(
            f"{file} has no token {missing[0]!r}: this model was not made for Qwen3-Reranker's "
            "prompt.",
            mend="--task generate or embed",
        )
    return no, yes


def _said(path: Path) -> tuple[int | None, int | None] | None:
    """(no, yes) of sentence-transformers' file, None without one."""
    file = path / f"1_{MODULE}" / "config.json"
    if not file.is_file():
        return None
    raw = read_json(file)
    return raw.get("false_token_id"), raw.get("true_token_id")
