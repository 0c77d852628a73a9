"""Decoders that only transformers knows, over our paged KV, attention and linear ops.

In: a checkpoint directory. Out: `FallbackSpec`, which the runner cannot tell from a native one.
transformers calls the attention function that we register, one for each loaded model, with q, k, v
of packed rows. The step's batch and KV are bound to that function, not sent as keyword arguments,
for some models (StableLM) do not hand those down to their layers. transformers reads the weights
itself, since its checkpoint names are its own affair; before that every tensor passes through
`weights.Checkpoint`, which refuses what is not finite, and after it a tensor that transformers had
to make up is an error.

What cannot be served right is refused: at load what config.json tells, in the first step (at start)
what only running tells.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenry.backend.base import KV, Op, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError, UnknownArchitecture
from tokenry.models.config import ModelConfig
from tokenry.models.fallback_attention import PagedAttention
from tokenry.models.spec import DecoderSpec
from tokenry.models.weights import Progress, open_checkpoint

LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackSpec(DecoderSpec):
    """A `backend.base.ModelSpec` of a transformers model."""

    trust_remote_code: bool

    def weights(self, progress: Progress) -> WeightIter:
        """Checkpoint tensors by checkpoint name, to be looked at; `torch_step` has transformers
        read the files again, from the page cache.
        """
        if self.dummy:
            progress(1.0)
            return iter(())
        return open_checkpoint(self.path).stream(progress)

    def torch_step(self, weights: WeightIter, ops: OpTable, caps: Caps) -> StepFn:
        """The transformers model with our linears and our attention."""
        for _ in weights:  # reading a tensor is what checks it
            pass
        attention = PagedAttention(self, ops)
        model = _load(self, attention)
        _fix_ropes(model, self.max_model_len)
        _replace_linears(self, model, ops, torch.device(caps.input_device))
        return _Step(model.to(caps.input_device), attention)


def load_fallback(
    path: Path,
    model: ModelConfig,
    *,
    dtype: str,
    max_model_len: int,
    dummy: bool,
    trust: bool,
) -> FallbackSpec:
    """The spec. Raises ModelLoadError without transformers, UnknownArchitecture if it cannot."""
    try:
        import transformers
    except ImportError as error:
        raise ModelLoadError(
            f"{model.architecture} has no native implementation here, and transformers, which may "
            "have one, is not installed.",
            mend='pip install "tokenry[hf]"',
        ) from error
    cls = getattr(transformers, model.architecture, None)
    if cls is None and not (trust and model.raw.get("auto_map")):
        raise _unknown(model, "transformers does not know it either")
    if model.raw.get("is_encoder_decoder"):
        raise _unknown(model, "it is an encoder-decoder")
    if cls is not None and "position_ids" not in inspect.signature(cls.forward).parameters:
        raise _unknown(model, "it takes no positions, so its rows cannot be packed")
    strange = set(model.raw.get("layer_types") or ()) - LAYER_TYPES
    if strange:
        raise _unknown(model, f"it has layers of kind {', '.join(sorted(strange))}")
    if not dummy:
        open_checkpoint(path)  # a broken download is named before transformers trips over it
    return FallbackSpec(
        path=path,
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        dummy=dummy,
        trust_remote_code=trust,
        notes=(f"{model.architecture} runs through the transformers fallback",),
    )


def _unknown(model: ModelConfig, why: str) -> UnknownArchitecture:
    from tokenry.models.registry import NATIVE

    custom = model.raw.get("auto_map") is not None
    return UnknownArchitecture(
        f"{model.architecture} cannot be served: {why}. "
        f"Known are {', '.join(sorted(NATIVE))}, and most decoders of transformers.",
        mend="--trust-remote-code, if you trust the code in the model's repository"
        if custom
        else "a model of one of these architectures, or a newer transformers",
    )


def _load(spec: FallbackSpec, attention: PagedAttention) -> Any:
    """The model on the host. Raises ModelLoadError, UnknownArchitecture."""
    import transformers

    transformers.AttentionInterface.register(attention.name, attention)
    options: dict[str, Any] = {
        "dtype": getattr(torch, spec.dtype),
        "attn_implementation": attention.name,
        "trust_remote_code": spec.trust_remote_code,
    }
    auto: Any = transformers.AutoModelForCausalLM
    try:
        if spec.dummy:
            config = transformers.AutoConfig.from_pretrained(
                spec.path, trust_remote_code=spec.trust_remote_code
            )
            return auto.from_config(config, **options).eval()
        with _no_bar():
            model, told = auto.from_pretrained(
                spec.path,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told with the others, not raised without a name
                **options,
            )
    except (ValueError, KeyError, ImportError) as error:
        raise _unknown(spec.model, f"transformers says {error}") from error
    except (RuntimeError, OSError) as error:
        raise ModelLoadError(
            f"transformers cannot load {spec.path}: {error}.",
            mend="do config.json and the weights belong together?",
        ) from error
    _refuse_made_up(spec, told)
    return model.eval()


@contextmanager
def _no_bar() -> Iterator[None]:
    """No bar of transformers is drawn: ours tells the share."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # theirs


def _refuse_made_up(spec: FallbackSpec, told: Mapping[str, Any]) -> None:
    """What the files lack, transformers fills with random numbers: ModelLoadError instead."""
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise ModelLoadError(
            f"{spec.path} lacks {len(lacking)} tensors that {spec.architecture} needs: "
            f"{', '.join(lacking[:4])}{' ...' if len(lacking) > 4 else ''}.",
            mend="do config.json and the weights belong together?",
        )
    unlike = sorted(told["mismatched_keys"])
    if unlike:
        name, found, wanted = unlike[0]
        raise ModelLoadError(
            f"{open_checkpoint(spec.path).where(name)}: {name} has shape {list(found)}, "
            f"{spec.architecture} expects {list(wanted)} ({len(unlike)} tensors of another shape).",
            mend="do config.json and the weights belong together?",
        )


def _fix_ropes(model: nn.Module, length: int) -> None:
    """Frequencies that follow the longest position of a batch are fixed by the longest possible
    one: cached keys cannot be turned again, and no request may depend on its neighbours.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    module: Any
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind in ("dynamic", "longrope"):
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](module.config, None, seq_len=length)
            module.inv_freq = frequencies
            module.attention_scaling = scaling
            module.rope_type = "default"


# ---- linear ------------------------------------------------------------------------------------


class OpLinear(nn.Module):
    """A packed linear in the place of a `nn.Linear`."""

    def __init__(
        self, linear: nn.Linear, op: Op, ops: OpTable, device: torch.device, *, head: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._op = op
        raw = {"weight": linear.weight.detach().to(device)}
        if linear.bias is not None:
            raw["bias"] = linear.bias.detach().to(device)
        self._packed = ops.pack(op, raw, head=head)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features]."""
        y: Tensor = self._op(x.reshape(-1, self.in_features), self._packed)
        return y.view(*x.shape[:-1], self.out_features)


def _replace_linears(
    spec: FallbackSpec, model: nn.Module, ops: OpTable, device: torch.device
) -> None:
    """Every plain `nn.Linear` becomes ours; subclasses may compute something else and stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                op = ops.resolve(
                    "linear",
                    dtype=spec.dtype,
                    in_features=child.in_features,
                    out_features=child.out_features,
                )
                head = child.out_features == spec.vocab_size
                setattr(parent, name, OpLinear(child, op, ops, device, head=head))


class _Step:
    """The step function: packed rows in, logits of the wanted rows out."""

    def __init__(self, model: Any, attention: PagedAttention) -> None:
        self._model, self._attention = model, attention
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._checked = False

    def __call__(self, batch: StepBatch, kv: KV) -> Tensor:
        """Logits [R, vocab] float32."""
        rows = batch.logit_rows.long()
        options = {"logits_to_keep": rows} if self._keeps else {}
        self._attention.begin(batch, kv)
        try:
            with torch.inference_mode():
                logits: Tensor = self._model(
                    input_ids=batch.token_ids.long()[None],
                    position_ids=batch.positions.long()[None],
                    use_cache=False,
                    **options,
                ).logits[0]
        finally:
            self._attention.end()
        if not self._checked:
            self._attention.check()
            self._checked = True
        return (logits if self._keeps else logits[rows]).float()
