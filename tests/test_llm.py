"""The offline API: a scripted engine for rare events; the demo model for the rest."""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from types import ModuleType, SimpleNamespace

import pytest

from tokenry.errors import ConfigError, EngineDead, ModelLoadError, RequestError, StepFailed
from tokenry.llm import LLM
from tokenry.messages import Ready, Stats, TokensEvent
from tokenry.params import SamplingParams


class EchoEngine:
    """Answers each request with its prompt's last tokens, one per step, newest request first."""

    def __init__(self) -> None:
        self.running: dict[str, deque[int]] = {}
        self.aborted: list[str] = []
        self.raise_at: dict[int, BaseException | str] = {}
        self.steps = 0
        self.closed = False

    def add(self, request) -> None:
        self.running[request.request_id] = deque(request.token_ids[-request.params.max_tokens :])

    def abort(self, ids) -> None:
        self.aborted += ids
        for request_id in ids:
            self.running.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self):
        self.steps += 1
        planned = self.raise_at.get(self.steps)
        if isinstance(planned, BaseException):
            raise planned
        request_id, tokens = self.running.popitem()
        if planned is not None:
            return [TokensEvent(request_id=request_id, finish_reason="error", error=planned)]
        token = tokens.popleft()
        if tokens:
            self.running[request_id] = tokens
        reason = None if tokens else "length"
        return [
            Stats(steps=self.steps),
            TokensEvent(request_id=request_id, token_ids=(token,), finish_reason=reason),
        ]

    def stats(self) -> Stats:
        return Stats(steps=self.steps)

    def reset_prefix_cache(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def echo(monkeypatch):
    """An LLM over the demo's tokenizer whose engine is scripted, and that engine."""
    engine = EchoEngine()
    ready = Ready(
        max_model_len=64,
        num_blocks=8,
        block_size=16,
        vocab_size=4096,
        backend="echo",
        device_name="echo",
        architecture="Echo",
        dtype="float32",
        ledger={},
    )
    module = ModuleType("tokenry.assemble")
    module.assemble = lambda config, progress: SimpleNamespace(engine=engine, ready=ready)
    monkeypatch.setitem(sys.modules, "tokenry.assemble", module)
    return LLM("demo"), engine


def test_outputs_stand_in_the_order_of_the_prompts(echo):
    llm, _ = echo
    prompts = ["a tale", "the king was old", "x"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    assert [o.prompt for o in outputs] == prompts
    assert [o.outputs[0].text for o in outputs] == [" tale", " old", "x"]
    assert all(o.finished for o in outputs)


def test_every_form_of_a_prompt(echo):
    llm, _ = echo
    ids = llm.get_tokenizer().encode("a tale")
    forms = ["a tale", ["a tale"], ids, [ids], {"prompt": "a tale"}, {"prompt_token_ids": ids}]
    for form in forms:
        (output,) = llm.generate(form, use_tqdm=False)
        assert (list(output.prompt_token_ids), output.outputs[0].text) == (ids, "a tale")


def test_params_for_each_prompt(echo):
    llm, _ = echo
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2)]
    outputs = llm.generate(["a tale", "a tale"], params, use_tqdm=False)
    assert [[len(c.token_ids) for c in o.outputs] for o in outputs] == [[1], [2, 2]]
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", params)


def test_chat_renders_the_template(echo):
    llm, _ = echo
    message = {"role": "user", "content": "Tell"}
    (output,) = llm.chat([message], use_tqdm=False)
    assert output.prompt == "<|endoftext|><|user|>Tell<|end|><|assistant|>"
    assert len(llm.chat([[message], [message]], use_tqdm=False)) == 2


def test_stop_string_aborts_its_request(echo):
    llm, engine = echo
    (output,) = llm.generate("once upon a time", SamplingParams(stop="upon"), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("once ", "upon")
    assert engine.aborted == ["0#0"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")], ids=repr)
def test_interrupted_call_leaves_nothing_running(echo, error):
    llm, engine = echo
    engine.raise_at[2] = error
    with pytest.raises(type(error)):
        llm.generate(["a tale", "of a king"], SamplingParams(n=2), use_tqdm=False)
    assert engine.running == {}
    assert len(engine.aborted) == 4
    (output,) = llm.generate("a tale", use_tqdm=False)
    assert output.outputs[0].text == "a tale"


def test_bad_prompt_starts_no_other(echo):
    llm, engine = echo
    with pytest.raises(RequestError) as caught:
        llm.generate(["fine", [99999]], use_tqdm=False)
    assert caught.value.param == "prompts[1]"
    assert engine.running == {}


def test_failed_step_is_raised_with_its_text(echo):
    llm, engine = echo
    engine.raise_at[1] = "NaN in the logits"
    with pytest.raises(StepFailed, match="NaN"):
        llm.generate(["a", "b"], use_tqdm=False)
    assert engine.running == {}


def test_closed_llm_says_so(echo):
    llm, engine = echo
    with llm:
        assert llm.get_metrics().steps == 0
        assert llm.reset_prefix_cache()
    assert engine.closed
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("a", use_tqdm=False)


def test_names_of_vllm_are_understood(echo):
    llm = LLM("demo", gpu_memory_utilization=0.5)
    assert llm.config.memory_fraction == 0.5
    with pytest.raises(ConfigError, match="the same option"):
        LLM("demo", gpu_memory_utilization=0.5, memory_fraction=0.5)


def test_unknown_option_proposes_the_nearest(echo):
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM("demo", max_model_lenn=5)


def test_unknown_model_is_an_error(echo):
    with pytest.raises(ModelLoadError):
        LLM("./nowhere")


def test_progress_bar_shows_tokens_per_second(echo, capsys):
    llm, _ = echo
    llm.generate(["a tale", "b"], use_tqdm=True)
    assert "tok/s" in capsys.readouterr().err


# ---- the demo model, end to end ------------------------------------------------------------------

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("tokenry.assemble") is None, reason="tokenry.assemble is not built yet"
)


@pytest.fixture(scope="module")
def demo_llm():
    with LLM("demo", backend="cpu", max_model_len=256, num_kv_blocks=64, block_size=16) as llm:
        yield llm


@needs_engine
def test_demo_tells_a_story(demo_llm):
    message = {"role": "user", "content": "Tell me a story about a fox."}
    params = SamplingParams(temperature=0, max_tokens=24)
    (output,) = demo_llm.chat([message], params, use_tqdm=False)
    completion = output.outputs[0]
    assert len(completion.text.split()) > 5
    assert completion.text == demo_llm.get_tokenizer().decode(completion.token_ids)
    assert completion.finish_reason in ("length", "stop")


@needs_engine
def test_seeded_completions_do_not_depend_on_the_batch(demo_llm):
    params = SamplingParams(seed=11, n=2, max_tokens=12)
    alone = demo_llm.generate("Once upon a time", params, use_tqdm=False)[0]
    others = ["There was a king", "The little girl", "A"]
    among = demo_llm.generate([*others, "Once upon a time"], params, use_tqdm=False)[-1]
    assert [c.token_ids for c in among.outputs] == [c.token_ids for c in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


@needs_engine
def test_demo_stops_at_a_string_and_reports_logprobs(demo_llm):
    params = SamplingParams(temperature=0, max_tokens=40, stop=[" the"], logprobs=2)
    (output,) = demo_llm.generate("Once upon a time", params, use_tqdm=False)
    completion = output.outputs[0]
    assert " the" not in completion.text
    assert completion.stop_reason == " the"
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.cumulative_logprob < 0
    assert demo_llm.get_metrics().num_running == 0
