"""POST /pooling and /classify, and what every route that answers with vectors shares: reading texts
or token ids, running them, usage. The shapes are vLLM's.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.answer import answer_whole, ignored_header
from tokenry.api.body import read_json
from tokenry.api.routes import Endpoint, post
from tokenry.api.run import Prompt, Run
from tokenry.api.schema import decode_known
from tokenry.api.service import Service, new_id, service_of
from tokenry.errors import RequestError
from tokenry.outputs import RequestOutput
from tokenry.params import SamplingParams
from tokenry.pooling import PoolingFacts, PoolingParams
from tokenry.text.pooling import (
    PooledInput,
    PooledInputs,
    check_params,
    check_wanted,
    floats,
)

MAX_INPUTS = 2048
"""Of one request, as in OpenAI's API."""
MEANINGLESS = ("user", "metadata")
"""Fields that change nothing."""
NOTHING = SamplingParams(max_tokens=0)

Priority = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Encoding = Literal["float", "base64"]


class Pooled(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that all of these routes have.

    truncate_prompt_tokens   inputs longer than this are cut, -1: than the model takes; without it
                             a longer one is refused.
    """

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    request_id: str | None = None


class PoolingRequest(Pooled, frozen=True, kw_only=True):
    """POST /pooling. `input`: str, [str], [int] or [[int]]."""

    input: Any
    task: Literal["embed", "classify"] | None = None
    encoding_format: Encoding | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None


class ClassifyRequest(Pooled, frozen=True, kw_only=True):
    """POST /classify. use_activation false: the classifier's raw values."""

    input: Any
    use_activation: bool | None = None


class Vectors:
    """One request's inputs on their way through the engine, and the fields of its answer."""

    def __init__(self, request: Request, service: Service, wanted: Pooled, prefix: str) -> None:
        self._request, self._service, self._wanted = request, service, wanted
        self._model = service.check_model(wanted.model)
        service.admit()
        self.id = f"{prefix}-{wanted.request_id}" if wanted.request_id else new_id(prefix)

    @property
    def facts(self) -> PoolingFacts | None:
        """What the model gives."""
        return self._service.engine.ready.limits.vectors

    @property
    def head(self) -> dict[str, Any]:
        """Fields that begin an answer."""
        return {
            "id": self.id,
            "object": "list",
            "created": int(time.time()),
            "model": self._model,
        }

    @property
    def max_len(self) -> int:
        """Longest input."""
        return self._service.engine.ready.max_model_len

    def inputs(self, *, cut: bool = False, instruction: str | None = None) -> PooledInputs:
        """Makes inputs as the request wants them; `cut`: to what the model takes, if the request
        does not say; `instruction`: of a pair's prompt.
        """
        special, truncate = self._wanted.add_special_tokens, self._wanted.truncate_prompt_tokens
        return PooledInputs(
            self._service.engine.tokenizer,
            max_len=self.max_len,
            truncate=-1 if cut and truncate is None else truncate,
            special=True if special is None else special,
            template=None if self.facts is None else self.facts.template,
            instruction=instruction,
        )

    async def answer(
        self,
        make_inputs: Callable[[], Sequence[PooledInput]],
        params: PoolingParams,
        make: Callable[[list[RequestOutput]], Any],
        unknown: Sequence[str],
    ) -> Response:
        """Run the inputs, which are made off the event loop; `make` gives the answer's object."""
        if self.facts is not None:
            check_params(self.facts, params)
        inputs = await asyncio.to_thread(make_inputs)
        run = Run(self._service, self.id)
        run.submit(
            [
                Prompt(
                    token_ids=one.token_ids,
                    text=one.text,
                    param=one.param,
                    pooling=msgspec.structs.replace(params, second_text=one.second_text),
                )
                for one in inputs
            ],
            NOTHING,
            kind="final",
            priority=self._wanted.priority or 0,
            cache_salt="",
            asked_tokens=0,
        )
        headers = ignored_header(unknown)
        return await answer_whole(self._request, self._service, run, make, headers)


def read_inputs(inputs: PooledInputs, given: Any) -> list[PooledInput]:
    """Of str, [str], [int] or [[int]]."""
    if isinstance(given, str):
        return [inputs.one(given, "input")]
    if not isinstance(given, list):
        raise RequestError("input must be a text, token ids, or a list of either.", param="input")
    if given and all(type(i) is int for i in given):
        return [inputs.one(given, "input")]
    if not 0 < len(given) <= MAX_INPUTS:
        raise RequestError(
            f"input must hold 1 to {MAX_INPUTS} texts, got {len(given)}.", param="input"
        )
    return [inputs.one(one, f"input[{i}]") for i, one in enumerate(given)]


def encoded(output: RequestOutput, encoding: Encoding | None) -> str | tuple[float, ...]:
    """A vector as a list of numbers, or as base64 of its float32 bytes."""
    pooled = output.pooled or b""
    return base64.b64encode(pooled).decode() if encoding == "base64" else floats(pooled)


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens of all inputs."""
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": count, "total_tokens": count}


async def pooling(request: Request) -> Response:
    """Whatever the model gives, embeddings or classes."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, PoolingRequest, strict=strict, meaningless=MEANINGLESS)
    vectors = Vectors(request, service, wanted, "pool")
    kind = "embed" if vectors.facts is None else vectors.facts.kind
    asked = wanted.task or kind
    check_wanted(vectors.facts, asked, "embeddings" if asked == "embed" else "classes")
    own, other = ("normalize", "use_activation") if kind == "embed" else (
        "use_activation", "normalize"
    )  # fmt: skip
    if getattr(wanted, other) is not None:
        raise RequestError(f"{other} means nothing for this model; {own} does.", param=other)
    params = PoolingParams(dimensions=wanted.dimensions, final=getattr(wanted, own))

    def make(outputs: list[RequestOutput]) -> dict[str, Any]:
        values = [encoded(output, wanted.encoding_format) for output in outputs]
        data = [{"index": i, "object": "pooling", "data": v} for i, v in enumerate(values)]
        return {**vectors.head, "data": data, "usage": usage_of(outputs)}

    inputs = vectors.inputs()
    return await vectors.answer(lambda: read_inputs(inputs, wanted.input), params, make, unknown)


async def classify(request: Request) -> Response:
    """The likeliest class of each text, and the probabilities of all."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, ClassifyRequest, strict=strict, meaningless=MEANINGLESS)
    vectors = Vectors(request, service, wanted, "classify")
    labels = check_wanted(vectors.facts, "classify", "classes").labels

    def make(outputs: list[RequestOutput]) -> dict[str, Any]:
        found = [floats(output.pooled or b"") for output in outputs]
        classes = [
            {
                "index": i,
                "label": labels[max(range(len(probs)), key=probs.__getitem__)],
                "probs": probs,
                "num_classes": len(labels),
            }
            for i, probs in enumerate(found)
        ]
        return {**vectors.head, "data": classes, "usage": usage_of(outputs)}

    inputs, params = vectors.inputs(), PoolingParams(final=wanted.use_activation)
    return await vectors.answer(lambda: read_inputs(inputs, wanted.input), params, make, unknown)


ENDPOINTS: tuple[Endpoint, ...] = (
    post("/pooling", pooling, "What the model computes of texts.", PoolingRequest),
    post("/classify", classify, "Classes of texts.", ClassifyRequest),
)
