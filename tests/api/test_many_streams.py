"""256 streams at once with the demo model on the CPU: every one ends well, nothing is left."""

import asyncio
import json

import httpx2
import pytest

STREAMS, TOKENS = 256, 24


async def ask(client, i):
    body = {
        "prompt": f"Once upon a time number {i}",
        "max_tokens": TOKENS,
        "seed": i % 8,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    events = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
    return events


async def all_of_them(url):
    limits = httpx2.Limits(max_connections=STREAMS)
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(ask(client, i) for i in range(STREAMS)))


@pytest.mark.slow
def test_256_streams_end_without_an_error(start_server):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    command += ["--max-num-seqs", "256", "--num-kv-blocks", "2048", "--log-level", "warning"]
    server = start_server(command).wait_ready()
    streams = asyncio.run(all_of_them(server.url))
    for events in streams:
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert not [chunk for chunk in chunks if "error" in chunk]
        reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
        assert reasons[-1] == "length"
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert chunks[-1]["usage"]["completion_tokens"] == TOKENS
    assert server.http.get("/health/integrity").json() == {"ok": True}
    text = server.http.get("/metrics").text
    assert 'tokenry:num_requests_running{model_name="demo"} 0.0' in text
    assert 'tokenry:request_success_total{finished_reason="length",model_name="demo"} 256.0' in text
    assert server.close() == 0
