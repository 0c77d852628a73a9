"""The engines that `cpu_peers.py` compares, each behind the same two calls.

In: a model directory (`make_model.py`, converted by `convert.py` where the engine needs it), a
precision. Out: `generate(prompts, max_tokens)` -> token ids per prompt, greedy, EOS ignored. Each
class imports its engine only when it is made: this file is run by the Python of the engine's own
environment.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

Prompts = list[list[int]]
CONTEXT = 2304
"""Tokens of the longest workload, rounded up; every engine is given this context."""
SEQUENCES = 32
"""Most requests at once."""


class Engine(Protocol):
    """One engine with one model, ready."""

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """All prompts at once; `max_tokens` greedy tokens each."""


class Tokenry:
    """The engine of this project, in one process."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        from tokenry import LLM, SamplingParams

        quantized = {"quantization": precision} if precision.startswith("int") else {}
        # with quantised weights the KV has 8 bits, as OpenVINO's has (llama.cpp's has 16)
        kv = ["kv=int8"] if quantized else []
        dtype = "float32" if precision == "fp32" else "bfloat16"
        self._params = SamplingParams
        self._llm = LLM(
            str(model),
            backend="cpu",
            dtype=dtype,
            backend_option=[f"threads={threads}", *kv],
            max_model_len=CONTEXT,
            max_num_seqs=SEQUENCES,
            progress=False,
            **quantized,
        )

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """As Engine."""
        params = self._params(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        given = [{"prompt_token_ids": p} for p in prompts]
        outs = self._llm.generate(given, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]


class LlamaCpp:
    """llama-server, asked over HTTP; its slots do not share their KV."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = s.getsockname()[1]
        command = [
            str(Path(os.environ["PEER_BIN"]) / "llama-server"),
            *("-m", str(model / f"{precision}.gguf"), "--port", str(self._port)),
            *("-t", str(threads), "-tb", str(threads), "-c", str(CONTEXT * SEQUENCES)),
            *("-np", str(SEQUENCES), "--no-kv-unified", "-b", "2048", "-ub", "512"),
        ]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._server = subprocess.Popen(command, **quiet)
        while not self._ready():
            time.sleep(0.02)
        self._pool = concurrent.futures.ThreadPoolExecutor(SEQUENCES)

    def _ready(self) -> bool:
        if self._server.poll() is not None:
            raise RuntimeError(f"llama-server ended with {self._server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def _one(self, prompt: list[int], max_tokens: int) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        return list(answer["tokens"])

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """As Engine."""
        return list(self._pool.map(self._one, prompts, [max_tokens] * len(prompts)))


class OpenVINO:
    """OpenVINO GenAI's continuous batching with its prefix cache on."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self._np, self._ov, self._genai = np, ov, genai
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = SEQUENCES
        scheduler.max_num_batched_tokens = CONTEXT
        scheduler.enable_prefix_caching = True
        hint = "bf16" if precision == "bf16" else "f32"
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
        folder = "fp32" if precision == "bf16" else precision
        self._pipe = genai.ContinuousBatchingPipeline(
            str(model / f"openvino-{folder}"), scheduler, "CPU", properties
        )

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """As Engine."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [self._ov.Tensor(self._np.array([p], self._np.int64)) for p in prompts]
        outs = self._pipe.generate(inputs, [config] * len(prompts))
        return [list(out.m_generation_ids[0]) for out in outs]


class VLLM:
    """vLLM's CPU build."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            str(model),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
            max_model_len=CONTEXT,
            max_num_seqs=SEQUENCES,
            enable_prefix_caching=True,
        )

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """As Engine."""
        params = self._params(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        given = [{"prompt_token_ids": p} for p in prompts]
        outs = self._llm.generate(given, params, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in outs]


class Transformers:
    """transformers' generate, one padded batch (all prompts of a workload have one length)."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    def generate(self, prompts: Prompts, max_tokens: int) -> Prompts:
        """As Engine."""
        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [list(row) for row in out[:, ids.shape[1] :].tolist()]


ENGINES: dict[str, type[Any]] = {
    "tokenry": Tokenry,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVINO,
    "vllm": VLLM,
    "transformers": Transformers,
}
PRECISIONS = {
    "tokenry": ("fp32", "bf16", "int8", "int4"),
    "llama.cpp": ("fp32", "bf16", "int8", "int4"),
    "openvino": ("fp32", "bf16", "int8", "int4"),
    "vllm": ("fp32", "bf16"),
    "transformers": ("fp32", "bf16"),
}
"""int8 and int4 of llama.cpp are Q8_0 and Q4_0."""


def serve(name: str, model: Path, precision: str, threads: int) -> None:
    """Make the engine, say so, then answer one JSON line per line of standard input."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints goes to the log
    engine: Engine = ENGINES[name](model, precision, threads)
    first = engine.generate([[5, 6, 7, 8]], 1)
    channel.write(json.dumps({"ready": len(first[0])}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        outs = engine.generate(asked["prompts"], asked["max_tokens"])
        seconds = time.perf_counter() - begin
        wrong = [len(o) for o in outs if len(o) != asked["max_tokens"]]
        told = {"seconds": seconds, "wrong_lengths": wrong, "first": outs[0][:8]}
        channel.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
