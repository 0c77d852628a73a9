"""A real EngineCore over a runner without a model: a token follows from the last one and the seed.

Its factory is given to the engine process by name; TOY_STEP_S makes its steps slow,
TOY_MAX_TOP_K makes it refuse what is larger.
"""

import os
import time
from types import SimpleNamespace

from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.errors import ModelLoadError, Refusal
from tokenry.messages import Ready
from tokenry.plan import RowResult, StepResult, TokenLogprobs

BLOCKS = 64


class ToyRunner:
    def __init__(self):
        self.requests = {}
        self.step_s = float(os.environ.get("TOY_STEP_S", "0"))
        self.max_top_k = int(os.environ.get("TOY_MAX_TOP_K", "1000000"))

    def run(self, plan):
        time.sleep(self.step_s)
        for request_id in plan.forget:
            self.requests.pop(request_id, None)
        for new in plan.new:
            self.requests[new.request_id] = (list(new.token_ids), new)
        rows = tuple(self._row(row) for row in plan.rows)
        result = StepResult(step=plan.step, rows=rows)
        return lambda: result

    def _row(self, row):
        tokens, new = self.requests[row.request_id]
        if new.params.top_k > self.max_top_k:  # the front is not told: the engine must refuse
            text = f"top_k {new.params.top_k}: this device draws from {self.max_top_k} at most."
            refusal = Refusal(message=text, param="top_k")
            return RowResult(request_id=row.request_id, error=text, refusal=refusal)
        prompt_logprobs = ()
        if new.params.prompt_logprobs is not None:
            first, last = (
                row.num_computed + 1,
                min(row.num_computed + row.num_new, new.num_prompt - 1),
            )
            prompt_logprobs = tuple(_entry(tokens[i]) for i in range(first, last + 1))
        if not row.sample:
            return RowResult(request_id=row.request_id, prompt_logprobs=prompt_logprobs)
        seed = new.seed if new.params.temperature else 0
        token = 300 + (tokens[-1] * 31 + seed * 7 + len(tokens)) % 1000
        tokens.append(token)
        logprobs = () if new.params.logprobs is None else (_entry(token),)
        return RowResult(
            request_id=row.request_id,
            token_ids=(token,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _entry(token):
    return TokenLogprobs(token_ids=(token, 300, 301), logprobs=(-0.5, -1.0, float("-inf")), rank=1)


def make(config, progress):
    progress("toy weights", 0.5)
    time.sleep(float(os.environ.get("TOY_LOAD_S", "0")))
    if os.environ.get("TOY_FAIL"):
        raise ModelLoadError("The toy is broken.", mend="glue it")
    limits = EngineLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=512,
        num_blocks=BLOCKS,
        block_size=16,
    )
    ready = Ready(
        max_model_len=512,
        num_blocks=BLOCKS,
        block_size=16,
        vocab_size=4096,
        backend="toy",
        device_name="toy",
        architecture="Toy",
        dtype="float32",
        ledger={"weights": 4096},
    )
    return SimpleNamespace(engine=EngineCore(limits, ToyRunner()), ready=ready)
