"""From the directory of a bidirectional encoder to a model that a backend can build.

In: a directory, its config, what is pooled. Out: `EncoderSpec`. An architecture that is not in
`ENCODERS` is none of ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tokenry.backend.base import StepFn, WeightIter
from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError, UnknownArchitecture
from tokenry.models.config import ModelConfig
from tokenry.models.encoder import Encoder, EncoderPlan, encoder_step
from tokenry.models.head import PoolingPlan
from tokenry.models.layers import Loader
from tokenry.models.spec import Spec
from tokenry.models.weights import Progress, dummy_weights, open_checkpoint, weight_bytes

ENCODERS: Mapping[str, str] = {
    "Bert": "bert:plan",
    "Roberta": "bert:plan_roberta",
    "XLMRoberta": "bert:plan_roberta",
    "DistilBert": "bert:plan_distilbert",
    "ModernBert": "modernbert:plan",
    "MPNet": "bert:plan_mpnet",
}
"""Family -> file and function in `families/`."""
ENDINGS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForPreTraining")
"""What may follow the family in an architecture's name: the encoder is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec(Spec):
    """A `backend.base.ModelSpec` without KV."""

    plan: EncoderPlan
    pooling: PoolingPlan

    @property
    def has_token_types(self) -> bool:
        """Whether the texts of a pair are told apart."""
        return self.plan.token_types > 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint, at most; 0 for dummy weights."""
        return 0 if self.dummy else weight_bytes(self.path)

    def weights(self, progress: Progress) -> WeightIter:
        """Checkpoint tensors by checkpoint name."""
        if not self.dummy:
            return open_checkpoint(self.path).stream(progress)
        loader = Loader(OpTable(), dtype=self.dtype, device="meta")
        encoder = Encoder(loader, self.model, self.plan, max_len=1, method=self.pooling.method)
        return dummy_weights(encoder.shapes, self.dtype, progress)

    def torch_step(self, weights: WeightIter, ops: OpTable, caps: Caps) -> StepFn:
        """Our encoder over the ops, with the weights in it."""
        where = str if self.dummy else open_checkpoint(self.path).where
        loader = Loader(ops, dtype=self.dtype, device=caps.input_device, where=where)
        plan = replace(self.plan, rename=lambda n, t: [(n, t)]) if self.dummy else self.plan
        method = self.pooling.method
        encoder = Encoder(loader, self.model, plan, max_len=self.max_model_len, method=method)
        encoder.load(weights)
        return encoder_step(encoder)


def load_encoder(
    path: Path,
    model: ModelConfig,
    pooling: PoolingPlan,
    *,
    dtype: str,
    max_model_len: int,
    dummy: bool = False,
) -> EncoderSpec:
    """The spec of an encoder. Raises UnknownArchitecture, or ModelLoadError for a field that would
    make another model of it.
    """
    plan = encoder_plan(model)
    room = model.max_len if plan.positions is None else plan.positions - plan.first_position
    if max_model_len > room:
        raise ModelLoadError(
            f"{model.architecture} has {room} positions, {max_model_len} are asked for.",
            mend=f"--max-model-len {room}",
        )
    return EncoderSpec(
        path=path,
        model=model,
        plan=plan,
        pooling=pooling,
        dtype=dtype,
        max_model_len=max_model_len,
        dummy=dummy,
        notes=pooling.notes,
    )


def encoder_plan(model: ModelConfig) -> EncoderPlan:
    """The architecture as data."""
    family = next((f for f in ENCODERS if model.architecture in {f + e for e in ENDINGS}), None)
    if family is None:
        known = ", ".join(f"{f}Model" for f in ENCODERS)
        raise UnknownArchitecture(
            f"{model.architecture} is no encoder that can be served; known: {known}, and each "
            "with ForSequenceClassification.",
            mend="another model",
        )
    for name in ("is_decoder", "add_cross_attention"):
        if model.get(name):
            raise ModelLoadError(
                f"{name} of this {model.architecture} is true: it is no encoder.",
                mend="a model without it, or remove the field if the weights do not follow it",
            )
    module, function = ENCODERS[family].split(":")
    families = importlib.import_module(f"tokenry.models.families.{module}")
    plan: EncoderPlan = getattr(families, function)(model)
    return plan
