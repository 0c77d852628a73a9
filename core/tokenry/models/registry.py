"""From a checkpoint directory to a model that a backend can build.

In: a directory. Out: `NativeSpec` (our own decoder) or, for what only transformers knows, the
fallback's spec. Unknown
architectures are an error that lists what is known.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenry.backend.base import StepFn, WeightIter
from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError, UnknownArchitecture
from tokenry.models.config import ENCODERS, ModelConfig, read_config
from tokenry.models.decoder import Decoder, DecoderPlan, Gives, decoder_step
from tokenry.models.encoder_spec import load_encoder
from tokenry.models.foreign import check_fields
from tokenry.models.head import PoolingPlan
from tokenry.models.layers import Loader
from tokenry.models.pooling import served_len
from tokenry.models.spec import DecoderSpec
from tokenry.models.weights import Progress, dummy_weights, open_checkpoint

NATIVE: Mapping[str, str] = {
    "LlamaForCausalLM": "llama:plan",
    "MistralForCausalLM": "llama:plan",
    "Qwen2ForCausalLM": "qwen:plan_qwen2",
    "Qwen3ForCausalLM": "qwen:plan_qwen3",
    "Qwen3MoeForCausalLM": "qwen:plan_qwen3_moe",
    "Gemma2ForCausalLM": "gemma:plan_gemma2",
    "Gemma3ForCausalLM": "gemma:plan_gemma3",
    "Gemma3ForConditionalGeneration": "gemma:plan_gemma3",
    "Phi3ForCausalLM": "phi3:plan",
    "Olmo2ForCausalLM": "olmo2:plan",
    "GraniteForCausalLM": "granite:plan",
    "MixtralForCausalLM": "mixtral:plan",
    "GPT2LMHeadModel": "gpt2:plan",
}
"""Architecture -> file and function in `families/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeSpec(DecoderSpec):
    """A `backend.base.ModelSpec` of our own decoder.

    gives    what a step gives of a row; pooling: what becomes of it, None where nothing is pooled.
    """

    plan: DecoderPlan
    gives: Gives = "logits"
    pooling: PoolingPlan | None = None

    def weights(self, progress: Progress) -> WeightIter:
        """Checkpoint tensors by checkpoint name."""
        if not self.dummy:
            return open_checkpoint(self.path).stream(progress)
        loader = Loader(OpTable(), dtype=self.dtype, device="meta")
        shapes = Decoder(loader, self.model, self.plan, max_len=1, gives=self.gives).shapes
        return dummy_weights(shapes, self.dtype, progress)

    def torch_step(self, weights: WeightIter, ops: OpTable, caps: Caps) -> StepFn:
        """Our decoder over the ops, with the weights in it."""
        where = str if self.dummy else open_checkpoint(self.path).where
        loader = Loader(ops, dtype=self.dtype, device=caps.input_device, where=where)
        plan = replace(self.plan, rename=lambda n, t: [(n, t)]) if self.dummy else self.plan
        decoder = Decoder(loader, self.model, plan, max_len=self.max_model_len, gives=self.gives)
        decoder.load(weights)
        return decoder_step(decoder)


def load_spec(
    path: Path,
    *,
    dtype: str,
    max_model_len: int | None = None,
    dummy: bool = False,
    trust_remote_code: bool = False,
    pooling: PoolingPlan | None = None,
    tokens: bool = True,
) -> Any:
    """The NativeSpec, EncoderSpec or FallbackSpec of a checkpoint; dtype is resolved already, see
    `pick_dtype`.

    pooling  what is computed of hidden rows, see `plan_pooling`; None: nothing but tokens.
    tokens   whether the model also generates.
    Raises ModelLoadError, UnknownArchitecture.
    """
    model = read_config(path)
    if pooling is not None and model.architecture.startswith(ENCODERS):
        length = max_model_len or served_len(path, model)
        return load_encoder(path, model, pooling, dtype=dtype, max_model_len=length, dummy=dummy)
    length = max_model_len or (model.max_len if pooling is None else served_len(path, model))
    said, model = model.architecture, replace(model, architecture=_causal(model.architecture))
    entry = NATIVE.get(model.architecture)
    if entry is None and pooling is not None:
        raise UnknownArchitecture(
            f"{said} has no native implementation here, and only those give vectors.",
            mend=f"an encoder ({', '.join(ENCODERS)}), or one of {', '.join(NATIVE)}",
        )
    if entry is None:
        from tokenry.models.fallback import load_fallback

        _check_length(model, length, learned=True)
        return load_fallback(
            path, model, dtype=dtype, max_model_len=length, dummy=dummy, trust=trust_remote_code
        )
    notes = check_fields(model)
    module, function = entry.split(":")
    plan = getattr(importlib.import_module(f"tokenry.models.families.{module}"), function)(model)
    notes += _check_length(model, length, learned=plan.positions is not None)
    if model.raw.get("vision_config"):
        notes += (f"{model.architecture} is served as a text model, without images",)
    return NativeSpec(
        path=path,
        model=model,
        plan=plan,
        dtype=dtype,
        max_model_len=length,
        dummy=dummy,
        notes=notes + (pooling.notes if pooling is not None else ()),
        gives="logits" if pooling is None else "both" if tokens else "hidden",
        pooling=pooling,
    )


def _causal(architecture: str) -> str:
    """The name under which the same decoder generates: a head for classes, or none, is a file's
    matter.
    """
    for ending in ("ForSequenceClassification", "Model"):
        if architecture.endswith(ending) and not architecture.endswith("LMHeadModel"):
            family = architecture.removesuffix(ending)
            return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return architecture


def _check_length(model: ModelConfig, length: int, *, learned: bool) -> tuple[str, ...]:
    """Rotary positions can go on past the model's length, which is worth a note; learned ones (and
    the fallback's, of which we do not know) cannot: ModelLoadError.
    """
    if length <= model.max_len:
        return ()
    if learned:
        raise ModelLoadError(
            f"{model.architecture} has {model.max_len} positions, {length} are asked for.",
            mend=f"--max-model-len {model.max_len}",
        )
    return (
        f"max_model_len {length} is beyond the {model.max_len} tokens this model was made for: "
        "expect nonsense there",
    )


def pick_dtype(wanted: str, checkpoint: str, caps: Caps) -> str:
    """The dtype to run in: `wanted` if the backend has it; for "auto" the checkpoint's, or float32
    where the backend prefers that.
    """
    if wanted != "auto":
        if wanted not in caps.dtypes:
            raise ModelLoadError(
                f"--dtype {wanted}: this backend has {', '.join(caps.dtypes)}.", mend="--dtype auto"
            )
        return wanted
    preferred = caps.dtypes[0]
    return preferred if preferred == "float32" or checkpoint not in caps.dtypes else checkpoint
