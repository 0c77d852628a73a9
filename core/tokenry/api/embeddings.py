"""POST /v1/embeddings, as OpenAI's clients and vLLM's users know it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.body import read_json
from tokenry.api.pooling import (
    MEANINGLESS,
    Encoding,
    Pooled,
    Vectors,
    encoded,
    read_inputs,
    usage_of,
)
from tokenry.api.routes import Endpoint, post
from tokenry.api.schema import decode_known
from tokenry.api.service import service_of
from tokenry.outputs import RequestOutput
from tokenry.pooling import PoolingParams
from tokenry.text.pooling import check_wanted


class EmbeddingRequest(Pooled, frozen=True, kw_only=True):
    """`input`: str, [str], [int] or [[int]]. normalize false: vectors as the model computes them,
    true: of length 1; without it as the model's files say.
    """

    input: Any
    encoding_format: Encoding | None = None
    dimensions: int | None = None
    normalize: bool | None = None


async def embeddings(request: Request) -> Response:
    """One embedding per input."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, EmbeddingRequest, strict=strict, meaningless=MEANINGLESS)
    vectors = Vectors(request, service, wanted, "embd")
    check_wanted(vectors.facts, "embed", "embeddings")
    params = PoolingParams(dimensions=wanted.dimensions, final=wanted.normalize)

    def make(outputs: list[RequestOutput]) -> dict[str, Any]:
        values = [encoded(output, wanted.encoding_format) for output in outputs]
        data = [
            {"index": i, "object": "embedding", "embedding": value}
            for i, value in enumerate(values)
        ]
        return {**vectors.head, "data": data, "usage": usage_of(outputs)}

    inputs = vectors.inputs()
    return await vectors.answer(lambda: read_inputs(inputs, wanted.input), params, make, unknown)


ENDPOINTS: tuple[Endpoint, ...] = (
    post("/v1/embeddings", embeddings, "Embeddings of texts.", EmbeddingRequest),
)
