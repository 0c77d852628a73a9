"""AsyncEngine.encode: vectors from an engine process, beside each other, aborted, after its end."""

import asyncio
from typing import Any

import pytest

from tokenry.async_engine import AsyncEngine
from tokenry.config import EngineConfig
from tokenry.errors import EngineDead, RequestError
from tokenry.pooling import PoolingParams


def test_an_async_engine_encodes(bert: Any, open_llm: Any, words: Any) -> None:
    texts = [words(*range(i, i + 1 + i % 30)) for i in range(20)]
    want = open_llm(bert[0]).embed(texts, use_tqdm=False)

    async def ask() -> None:
        config = EngineConfig(model=str(bert[0]), backend="cpu", backend_option=("threads=1",))
        engine = await AsyncEngine.start(config)
        try:
            found = await asyncio.gather(*(engine.encode(text) for text in texts))
            assert [o.outputs.data for o in found] == [o.outputs.embedding for o in want]
            with pytest.raises(RequestError, match="not trained to be cut"):
                await engine.encode("w1", PoolingParams(dimensions=3))
            with pytest.raises(RequestError, match="does not generate text"):
                async for _ in engine.generate("w1"):
                    pass
            gone = asyncio.create_task(engine.encode(texts[5]))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert engine.num_requests == 0
            await engine.check_integrity()
            late = asyncio.create_task(engine.encode(texts[5]))
            await asyncio.sleep(0)
        finally:
            await engine.shutdown()
        with pytest.raises(EngineDead):
            await late

    asyncio.run(ask())
