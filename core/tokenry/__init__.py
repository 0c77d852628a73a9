"""tokenry: serve large language models on any accelerator. The public names, imported when they are
first used.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenry.async_engine import AsyncEngine
    from tokenry.backend.contract import hookimpl
    from tokenry.beam_search import BeamSearchParams
    from tokenry.config import EngineConfig, ServerConfig
    from tokenry.llm import LLM
    from tokenry.outputs import CompletionOutput, RequestOutput
    from tokenry.params import SamplingParams, Watermark
    from tokenry.structured import StructuredOutputs

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "tokenry.async_engine",
    "BeamSearchParams": "tokenry.beam_search",
    "CompletionOutput": "tokenry.outputs",
    "EngineConfig": "tokenry.config",
    "LLM": "tokenry.llm",
    "RequestOutput": "tokenry.outputs",
    "SamplingParams": "tokenry.params",
    "ServerConfig": "tokenry.config",
    "StructuredOutputs": "tokenry.structured",
    "Watermark": "tokenry.params",
    "hookimpl": "tokenry.backend.contract",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "ServerConfig",
    "StructuredOutputs",
    "Watermark",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        collecting = gc.isenabled()
        gc.disable()  # all that modules make stays: looking through it is a tenth of the import
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        finally:
            if collecting:
                gc.enable()
    raise AttributeError(f"module 'tokenry' has no attribute {name!r}")
