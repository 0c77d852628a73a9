"""The offline API on the demo model, with its real engine; failures are planted in the runner."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch

from tokenry.errors import ConfigError, EngineDead, ModelLoadError, RequestError, StepFailed
from tokenry.llm import LLM
from tokenry.params import SamplingParams

SIZES = {"backend": "cpu", "max_model_len": 256, "block_size": 16, "progress": False}
PROMPTS = ["Once upon a time", "The king was old", "A little girl"]


def greedy(**values):
    return SamplingParams(temperature=0, **{"max_tokens": 8, **values})


def forcing(args):
    """A logits processor after which only one token can be drawn."""

    def force(history, logits):
        out = torch.full_like(logits, -torch.inf)
        out[args["token"]] = 0
        return out

    return force


@pytest.fixture(scope="module")
def demo_llm():
    processors = {"force": forcing}
    with LLM("demo", num_kv_blocks=64, logits_processors=processors, **SIZES) as llm:
        yield llm


@pytest.fixture
def llm(demo_llm):
    """The demo; a test must leave nothing running and every book in order."""
    yield demo_llm
    stats = demo_llm.get_metrics()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    demo_llm._engine.check_integrity()


class Planting:
    """A runner before the real one, that fails as it is told to."""

    def __init__(self, runner, *, at, launch=None, wait=None, row=None):
        self._runner, self._left = runner, at
        self._launch, self._wait, self._row = launch, wait, row

    def run(self, plan):
        self._left -= 1
        due = self._left == 0
        if due and self._launch is not None:
            raise self._launch
        waiter = self._runner.run(plan)

        def wait():
            nonlocal due
            if due and self._wait is not None:
                due = False  # a signal interrupts once
                raise self._wait
            result = waiter()
            if due and self._row is not None:
                first = msgspec.structs.replace(result.rows[0], token_ids=(), error=self._row)
                result = dataclasses.replace(result, rows=(first, *result.rows[1:]))
            return result

        return wait


@pytest.fixture
def plant(llm, monkeypatch):
    def planted(**how):
        engine = llm._engine
        monkeypatch.setattr(engine, "_runner", Planting(engine._runner, **how))

    return planted


def texts(outputs):
    return [completion.text for output in outputs for completion in output.outputs]


def test_outputs_stand_in_the_order_of_the_prompts(llm):
    lengths = (9, 3, 6)  # the first ends last
    params = [greedy(max_tokens=n) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.prompt for o in outputs] == PROMPTS
    assert all(o.finished for o in outputs)
    assert [len(o.outputs[0].token_ids) for o in outputs] == list(lengths)
    alone = [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert texts(outputs) == texts(alone)


def test_every_form_of_a_prompt(llm):
    text = PROMPTS[0]
    ids = llm.get_tokenizer().encode(text)
    forms = [text, [text], ids, [ids], {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, greedy(), use_tqdm=False) for form in forms]
    assert [len(o) for o in outputs] == [1] * len(forms)
    assert {o[0].prompt_token_ids for o in outputs} == {tuple(ids)}
    assert len({o[0].outputs[0].text for o in outputs}) == 1
    with pytest.raises(RequestError, match="known: prompt, prompt_token_ids"):
        llm.generate({"text": text})


@pytest.mark.parametrize(
    ("prompts", "where"),
    [(None, "prompts"), (5, "prompts"), (["a", None], "prompts[1]"), ({"prompt": None}, "prompt")],
    ids=str,
)
def test_what_is_no_prompt_is_named(llm, prompts, where):
    with pytest.raises(RequestError, match="must be a text, token ids") as caught:
        llm.generate(prompts, greedy())
    assert caught.value.param.startswith(where)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([[{"role": "user", "content": "a"}, {"role": "user", "content": None}]],
         "messages[1].content"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_message_is_named(llm, messages, param):
    with pytest.raises(RequestError) as caught:
        llm.chat(messages, greedy())
    assert caught.value.param == param


def test_a_prompt_of_the_whole_context_is_scored(llm):
    output = llm.generate([[5] * 256], greedy(max_tokens=0, prompt_logprobs=0))[0]
    assert len(output.prompt_logprobs) == 256
    with pytest.raises(RequestError, match="maximum context length is 256"):
        llm.generate([[5] * 256], greedy(max_tokens=1))


def test_params_for_each_prompt(llm):
    params = [greedy(max_tokens=1), SamplingParams(max_tokens=2, n=2, seed=1)]
    outputs = llm.generate(["Once upon", "Once upon"], params, use_tqdm=False)
    assert [[len(c.token_ids) for c in o.outputs] for o in outputs] == [[1], [2, 2]]
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", params)


def test_chat_renders_the_template(llm):
    message = {"role": "user", "content": "Tell"}
    (output,) = llm.chat([message], greedy(), use_tqdm=False)
    assert output.prompt == "<|endoftext|><|user|>Tell<|end|><|assistant|>"
    assert len(llm.chat([[message], [message]], greedy(max_tokens=1), use_tqdm=False)) == 2


def test_demo_tells_a_story(llm):
    message = {"role": "user", "content": "Tell me a story about a fox."}
    (output,) = llm.chat([message], greedy(max_tokens=24), use_tqdm=False)
    completion = output.outputs[0]
    assert len(completion.text.split()) > 5
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert completion.finish_reason in ("length", "stop")


def test_seeded_completions_do_not_depend_on_the_batch(llm):
    params = SamplingParams(seed=11, n=2, max_tokens=12)
    alone = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    among = llm.generate([*PROMPTS[1:], PROMPTS[0]], params, use_tqdm=False)[-1]
    assert [c.token_ids for c in among.outputs] == [c.token_ids for c in alone.outputs]
    assert alone.outputs[0].token_ids != alone.outputs[1].token_ids


def test_stop_string_ends_its_request_early_and_logprobs_are_told(llm):
    aborted = llm.get_metrics().num_requests_aborted
    params = greedy(max_tokens=40, stop=[" the"], logprobs=2)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    completion = output.outputs[0]
    assert " the" not in completion.text
    assert completion.stop_reason == " the"
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.cumulative_logprob < 0
    assert llm.get_metrics().num_requests_aborted == aborted + 1


def test_own_logits_processor_is_used(llm):
    params = greedy(logits_processor="force", extra_args={"token": 300}, max_tokens=3)
    (output,) = llm.generate("Once", params, use_tqdm=False)
    assert output.outputs[0].token_ids == (300,) * 3
    with pytest.raises(RequestError, match="installed: force"):
        llm.generate("Once", greedy(logits_processor="other"), use_tqdm=False)


@pytest.mark.parametrize(
    ("how", "raised", "text"),
    [
        ({"wait": KeyboardInterrupt("^C")}, KeyboardInterrupt, "C"),
        ({"launch": RuntimeError("boom")}, StepFailed, "boom"),
        ({"wait": RuntimeError("late boom")}, StepFailed, "late boom"),
        ({"row": "NaN in the logits"}, StepFailed, "NaN"),
    ],
    ids=["interrupt", "launch", "wait", "row"],
)
@pytest.mark.parametrize("at", [1, 3])
def test_call_that_fails_leaves_nothing_running(llm, plant, how, raised, text, at):
    want = texts(llm.generate(PROMPTS, greedy(), use_tqdm=False))
    plant(at=at, **how)
    with pytest.raises(raised, match=text):
        llm.generate(PROMPTS, greedy(n=2), use_tqdm=False)
    assert llm.get_metrics().num_running == 0
    assert texts(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == want
    while llm._engine.has_work():  # a step in flight whose requests have ended
        llm._engine.step()
    assert not llm._engine._scheduler._in_flight


def test_bad_prompt_starts_no_other(llm):
    before = llm.get_metrics()
    with pytest.raises(RequestError) as caught:
        llm.generate(["fine", [99999]], use_tqdm=False)
    assert caught.value.param == "prompts[1]"
    assert llm.get_metrics() == before


def test_priority_is_refused_where_it_would_mean_nothing(llm):
    with pytest.raises(RequestError, match="order of their arrival") as caught:
        llm.generate(["a", "b"], greedy(), use_tqdm=False, priority=[0, 1])
    assert caught.value.param == "priority"


def test_reset_forgets_cached_beginnings_and_changes_no_text(llm):
    prompt = "There was once a king who had three sons, and the youngest was called a fool. " * 2
    first, again = (llm.generate(prompt, greedy(), use_tqdm=False)[0] for _ in range(2))
    assert again.num_cached_tokens >= 16
    assert llm.reset_prefix_cache() is True
    (after,) = llm.generate(prompt, greedy(), use_tqdm=False)
    assert after.num_cached_tokens == 0
    assert first.outputs[0].text == again.outputs[0].text == after.outputs[0].text


def test_progress_bar_shows_tokens_per_second(llm, capsys):
    llm.generate(PROMPTS, greedy(), use_tqdm=True)
    assert "tok/s" in capsys.readouterr().err


def test_names_of_vllm_are_understood_and_a_closed_llm_says_so():
    with LLM("demo", gpu_memory_utilization=0.5, num_gpu_blocks_override=40, **SIZES) as llm:
        assert llm.config.memory_fraction == 0.5
        assert llm.get_metrics().num_blocks == 40
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("a", use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gpu_memory_utilization": 0.5, "memory_fraction": 0.5}, ConfigError, "the same option"),
        ({"max_model_lenn": 5}, ConfigError, "did you mean 'max_model_len'"),
        ({"model": "./nowhere"}, ModelLoadError, "nowhere"),
    ],
    ids=["twice", "mistyped", "absent"],
)
def test_llm_that_cannot_be_made_is_one_error(options, error, text):
    with pytest.raises(error, match=text):
        LLM(**{"model": "demo", **options})
