"""One streamed completion of a token-id prompt, with the time of every token."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx2

from tokenry.bench.figures import Timeline

REFUSED = 400


async def complete(
    client: httpx2.AsyncClient, model: str, prompt: list[int], max_tokens: int
) -> Timeline:
    """Stream `max_tokens` greedy tokens. A refusal or a broken stream is a Timeline with
    `error`.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    sent = time.perf_counter()
    stamps: list[float] = []
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return _failed(sent, prompt, _reason(response.status_code, text))
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return _failed(sent, prompt, str(chunk["error"].get("message")))
                if chunk.get("choices"):
                    stamps.append(time.perf_counter())
    except httpx2.HTTPError as error:
        return _failed(sent, prompt, f"{type(error).__name__}: {error}")
    if not stamps:
        return _failed(sent, prompt, "the stream carried no tokens")
    return Timeline(sent_s=sent, token_s=tuple(stamps), num_prompt=len(prompt))


def _failed(sent: float, prompt: list[int], error: str) -> Timeline:
    return Timeline(sent_s=sent, token_s=(), num_prompt=len(prompt), error=error)


def _reason(status: int, text: str) -> str:
    """Status and, of an OpenAI-shaped body, its code and message."""
    try:
        error = json.loads(text)["error"]
        return f"{status} {error.get('code') or error.get('type')}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {text[:200]}"


def open_client(url: str, api_key: str) -> httpx2.AsyncClient:
    """A client without a time limit: long answers are what is measured."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=None)
