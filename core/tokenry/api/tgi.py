"""/generate, /generate_stream, POST /, /info, /chat_tokenize: the API of Hugging Face's TGI.

In: TGI's body. Out: `{generated_text, details}`, or an event per token. Errors are TGI's, see
dialects.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import tokenry
from tokenry.api.answer import answer_whole, ignored_header
from tokenry.api.body import read_json
from tokenry.api.chat import check_messages, render
from tokenry.api.routes import get, post
from tokenry.api.run import Prompt, Run
from tokenry.api.schema import ChatRequest, decode, decode_known
from tokenry.api.service import Service, new_id, service_of
from tokenry.api.sse import TOKENS, EventStream
from tokenry.api.tgi_body import MAX_BEST_OF, GenerateRequest, Parameters, sampling_params
from tokenry.api.tokenize import pieces
from tokenry.api.wire import JSON, clamp
from tokenry.errors import RequestError
from tokenry.outputs import CompletionOutput, Logprob, RequestOutput
from tokenry.text.detokenizer import make_detokenizer


async def generate(request: Request) -> Response:
    """POST /generate."""
    return await _answer(request, stream=False, many=False)


async def generate_stream(request: Request) -> Response:
    """POST /generate_stream."""
    return await _answer(request, stream=True, many=False)


async def compat_generate(request: Request) -> Response:
    """POST /: either, as the body's `stream` says; a whole answer is a list of one."""
    return await _answer(request, stream=None, many=True)


async def info(request: Request) -> Response:
    """GET /info."""
    service = service_of(request)
    service.admit()
    ready, config = service.engine.ready, service.engine.config
    return JSON(
        {
            "model_id": service.model_names[0],
            "model_sha": config.revision,
            "model_dtype": ready.dtype,
            "model_device_type": ready.backend,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": config.max_num_seqs,
            "max_best_of": MAX_BEST_OF,
            "max_stop_sequences": 64,
            "max_input_tokens": ready.max_model_len - 1,
            "max_total_tokens": ready.max_model_len,
            "max_batch_total_tokens": ready.num_blocks * ready.block_size,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "tokenry",
            "version": tokenry.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def chat_tokenize(request: Request) -> Response:
    """POST /chat_tokenize: the rendered chat and its tokens with their places in the text."""
    service = service_of(request)
    data = await read_json(request)
    chat, unknown = decode(data, ChatRequest, strict=service.config.strict_params)
    service.check_model(chat.model if chat.model != "tgi" else None)
    check_messages(chat.messages)
    service.admit()
    tokenizer = service.engine.tokenizer
    prompt = await asyncio.to_thread(render, chat, tokenizer, service.answer_format)
    answer = {
        "tokenize_response": pieces(tokenizer, prompt.token_ids),
        "templated_text": prompt.text,
    }
    return JSON(answer, headers=ignored_header(unknown))


async def _answer(request: Request, *, stream: bool | None, many: bool) -> Response:
    service = service_of(request)
    data = await read_json(request)
    strict = service.config.strict_params
    wanted, unknown = decode_known(data, GenerateRequest, strict=strict, meaningless=("stream",))
    given = data.get("parameters")
    if isinstance(given, dict):
        known = set(Parameters.__struct_fields__)
        more = sorted(f"parameters.{name}" for name in set(given) - known)
        if more and strict:
            raise RequestError(f"There is no field {more[0]!r}.", param=more[0])
        unknown += more
    parameters = wanted.parameters or Parameters()
    streamed = bool(wanted.stream) if stream is None else stream
    service.admit()
    mark = service.defaults.watermark
    params = sampling_params(parameters, stream=streamed, mark=mark)
    prompt = await asyncio.to_thread(_prompt, wanted, service)
    run = Run(service, new_id("gen"))
    run.submit(
        [prompt],
        params,
        kind="delta" if streamed else "final",
        priority=0,
        cache_salt="",
        asked_tokens=parameters.max_new_tokens,
    )
    answer = _Generated(service, wanted.inputs, parameters)
    headers = ignored_header(unknown)
    if not streamed:

        def whole(outputs: Sequence[RequestOutput]) -> Any:
            one = answer.whole(outputs[0])
            return [one] if many else one

        return await answer_whole(request, service, run, whole, headers)

    async def events() -> AsyncGenerator[Any, None]:
        with service.active():
            async for event in answer.events(run):
                yield event

    return EventStream(events(), headers, at_end=run.close, manner=TOKENS)


def _prompt(wanted: GenerateRequest, service: Service) -> Prompt:
    if not wanted.inputs:
        raise RequestError("inputs must not be empty.", param="inputs")
    most = wanted.parameters.truncate if wanted.parameters else None
    encode = service.engine.tokenizer.encode
    ids = encode(wanted.inputs, whole=most is not None, param="inputs")
    kept = ids if most is None else ids[-most:]
    text = wanted.inputs if len(kept) == len(ids) else None
    return Prompt(token_ids=kept, text=text, param="inputs")


class _Generated:
    """The answer's two forms."""

    def __init__(self, service: Service, inputs: str, parameters: Parameters) -> None:
        self._tokenizer = service.engine.tokenizer
        self._full = inputs if parameters.return_full_text else ""
        self._parameters = parameters

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The generate response: of several, the one with the best mean log-probability."""
        ranked = sorted(output.outputs, key=_mean_logprob, reverse=True)
        answer: dict[str, Any] = {"generated_text": self._full + ranked[0].text}
        if self._parameters.details or self._parameters.decoder_input_details:
            prefill = self._prefill(output)
            answer["details"] = self._details(ranked[0], prefill)
            if len(ranked) > 1:
                others = [
                    {"generated_text": self._full + one.text, **self._details(one, prefill)}
                    for one in ranked[1:]
                ]
                answer["details"]["best_of_sequences"] = others
        return answer

    async def events(self, run: Run) -> AsyncGenerator[Any, None]:
        """An event per token; the last has the text and the details."""
        text, num_tokens, index = "", 0, 0
        async for item in run.updates():
            if item is None:
                yield None
                continue
            output, one = item[1], item[1].outputs[0]
            text += one.text
            num_tokens += len(one.token_ids)
            tokens = self._tokens(one, self._texts(one))
            tops = self._tops(one)
            for position, token in enumerate(tokens):
                index += 1
                last = one.finished and position == len(tokens) - 1
                end = {
                    "finish_reason": _reason(one),
                    "generated_tokens": num_tokens,
                    "input_length": len(output.prompt_token_ids),
                    "seed": self._parameters.seed,
                }
                yield {
                    "index": index,
                    "token": token,
                    **({"top_tokens": tops[position]} if tops else {}),
                    "generated_text": self._full + text if last else None,
                    "details": end if last else None,
                }

    def _texts(self, one: CompletionOutput) -> list[str]:
        """The text of a delta belongs to its last token: what came before was held back."""
        return [*[""] * (len(one.token_ids) - 1), one.text]

    def _details(self, one: CompletionOutput, prefill: list[Any]) -> dict[str, Any]:
        tops = self._tops(one)
        detokenizer = make_detokenizer(self._tokenizer, skip_special_tokens=False)
        texts = [detokenizer.feed((token_id,)) for token_id in one.token_ids]
        return {
            "finish_reason": _reason(one),
            "generated_tokens": len(one.token_ids),
            "seed": self._parameters.seed,
            "prefill": prefill,
            "tokens": self._tokens(one, texts),
            **({"top_tokens": tops} if tops else {}),
        }

    def _tokens(self, one: CompletionOutput, texts: Sequence[str]) -> list[dict[str, Any]]:
        known: Sequence[dict[int, Logprob]] = one.logprobs or ()
        return [
            {
                "id": token_id,
                "text": text,
                "logprob": clamp(entry[token_id].logprob),
                "special": token_id in self._tokenizer.special_ids,
            }
            for token_id, text, entry in zip(one.token_ids, texts, known, strict=True)
        ]

    def _tops(self, one: CompletionOutput) -> list[list[dict[str, Any]]]:
        most = self._parameters.top_n_tokens
        if not most:
            return []
        return [
            [
                {
                    "id": token_id,
                    "text": self._tokenizer.token_text(token_id),
                    "logprob": clamp(lp.logprob),
                    "special": token_id in self._tokenizer.special_ids,
                }
                for token_id, lp in sorted(entry.items(), key=lambda e: e[1].rank or 0)[:most]
            ]
            for entry in one.logprobs or ()
        ]

    def _prefill(self, output: RequestOutput) -> list[dict[str, Any]]:
        if not self._parameters.decoder_input_details:
            return []
        known = output.prompt_logprobs or (None,) * len(output.prompt_token_ids)
        return [
            {
                "id": token_id,
                "text": self._tokenizer.token_text(token_id),
                "logprob": None if entry is None else clamp(entry[token_id].logprob),
            }
            for token_id, entry in zip(output.prompt_token_ids, known, strict=True)
        ]


def _mean_logprob(one: CompletionOutput) -> float:
    return (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))


def _reason(one: CompletionOutput) -> str:
    if one.finish_reason == "length":
        return "length"
    return "stop_sequence" if isinstance(one.stop_reason, str) else "eos_token"


ENDPOINTS = (
    post("/", compat_generate, "As /generate, or /generate_stream if `stream`.", GenerateRequest),
    post("/generate", generate, "Continue a text.", GenerateRequest),
    post(
        "/generate_stream",
        generate_stream,
        "Continue a text, an event per token.",
        GenerateRequest,
        kind="text/event-stream",
    ),
    get("/info", info, "The model and the server's limits."),
    post("/chat_tokenize", chat_tokenize, "The tokens of a chat.", ChatRequest),
)
