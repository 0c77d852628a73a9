"""From request to commands, from events to outputs; the events are written by hand here."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.errors import ContextLengthExceeded, EngineDead, Refusal, RequestError, StepFailed
from tokenry.messages import RequestLimits, TokensEvent
from tokenry.params import SamplingParams
from tokenry.plan import TokenLogprobs
from tokenry.text.admission import tokenize_bad_words
from tokenry.text.outputs import OutputProcessor
from tokenry.text.tokenizer import Tokenizer

PROMPT = [10, 11, 12]


@pytest.fixture(scope="module")
def tokenizer(demo):
    return demo


@pytest.fixture
def processor(tokenizer):
    return OutputProcessor(tokenizer, max_model_len=64)


def play(processor, request_id, ids, *, size=1, finish="length", index=0):
    """Updates from events of `size` tokens each; the last carries the finish reason."""
    updates = []
    for at in range(0, len(ids), size):
        last = at + size >= len(ids)
        event = TokensEvent(
            request_id=f"{request_id}#{index}",
            token_ids=tuple(ids[at : at + size]),
            finish_reason=finish if last else None,
        )
        update = processor.update(event)
        if update is not None:
            updates.append(update)
    return updates


def test_one_command_per_completion(tokenizer):
    limits = RequestLimits(priorities=True)
    processor = OutputProcessor(tokenizer, max_model_len=64, limits=limits)
    params = SamplingParams(n=3, seed=7, max_tokens=None)
    commands = processor.add("r", PROMPT, params, priority=2, cache_salt="s")
    assert [c.request_id for c in commands] == ["r#0", "r#1", "r#2"]
    assert [c.params.seed for c in commands] == [7, 8, 9]
    assert {c.params.n for c in commands} == {1}
    assert {c.params.max_tokens for c in commands} == {61}
    assert {c.eos_token_ids for c in commands} == {(4,)}
    assert {(c.priority, c.cache_salt, c.token_ids) for c in commands} == {(2, "s", (10, 11, 12))}


def test_answer_never_exceeds_the_context(processor):
    (command,) = processor.add("r", PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True))
    assert command.params.max_tokens == 61
    assert command.eos_token_ids == ()


def test_seed_wraps_at_its_end(processor):
    commands = processor.add("r", PROMPT, SamplingParams(n=2, seed=2**64 - 1))
    assert [c.params.seed for c in commands] == [2**64 - 1, 0]


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("ab é🎉stop", max_size=30),
    size=st.integers(1, 4),
    stops=st.lists(st.text("ab stop", min_size=1, max_size=3), max_size=2),
)
def test_deltas_join_to_the_cumulative_text(tokenizer, text, size, stops):
    ids = tokenizer.encode("x" + text)
    processor = OutputProcessor(tokenizer, max_model_len=4096)
    params = SamplingParams(stop=stops)
    processor.add("c", PROMPT, params, kind="cumulative")
    processor.add("d", PROMPT, params, kind="delta")
    whole = play(processor, "c", ids, size=size)[-1].output.outputs[0]
    pieces = [u.output.outputs[0] for u in play(processor, "d", ids, size=size) if u.output]
    assert "".join(p.text for p in pieces) == whole.text
    assert sum((p.token_ids for p in pieces), ()) == whole.token_ids
    assert pieces[-1].finish_reason == whole.finish_reason is not None
    assert len(processor) == 0


def test_final_outputs_come_once_with_all_completions(processor, tokenizer):
    processor.add("r", PROMPT, SamplingParams(n=2), kind="final", prompt="the prompt")
    first = play(processor, "r", tokenizer.encode("one tale"), index=0)
    assert all(update.output is None for update in first)
    last = play(processor, "r", tokenizer.encode("two tales"), index=1, finish="stop")[-1]
    assert last.finished
    assert last.output.prompt == "the prompt"
    assert [c.index for c in last.output.outputs] == [0, 1]
    assert last.output.outputs[0].text == "one tale"
    assert [c.finish_reason for c in last.output.outputs] == ["length", "stop"]
    metrics = last.output.metrics
    assert metrics.arrival_s <= metrics.first_token_s <= metrics.finished_s


@settings(max_examples=30, deadline=None)
@given(
    text=st.text("ab é🎉stop", max_size=300),
    size=st.integers(1, 70),
    stops=st.lists(st.text("ab stop", min_size=2, max_size=3), max_size=1),
    finish=st.sampled_from(["length", "stop"]),
)
def test_what_is_read_at_the_end_is_what_a_stream_shows(tokenizer, text, size, stops, finish):
    ids = tokenizer.encode("x" + text)
    processor = OutputProcessor(tokenizer, max_model_len=4096)
    params = SamplingParams(stop=stops, min_tokens=3, max_tokens=1000)
    processor.add("d", PROMPT, params, kind="delta")
    processor.add("f", PROMPT, params, kind="final")
    streamed = play(processor, "d", ids, size=size, finish=finish)
    pieces = [u.output.outputs[0] for u in streamed if u.output]
    (whole,) = [
        u.output.outputs[0] for u in play(processor, "f", ids, size=size, finish=finish) if u.output
    ]
    assert whole.text == "".join(p.text for p in pieces)
    assert whole.token_ids == sum((p.token_ids for p in pieces), ())
    ends = [(p.finish_reason, p.stop_reason) for p in pieces]
    assert ends[-1] == (whole.finish_reason, whole.stop_reason)


def test_stop_string_ends_and_aborts(processor, tokenizer):
    processor.add("r", PROMPT, SamplingParams(stop=["upon a"]))
    ids = tokenizer.encode("once upon a time")
    updates = play(processor, "r", ids)
    last = updates[-1]
    assert last.abort == ("r#0",)
    completion = last.output.outputs[0]
    assert (completion.text, completion.finish_reason) == ("once ", "stop")
    assert completion.stop_reason == "upon a"
    assert len(completion.token_ids) < len(ids)  # what came after it was dropped
    assert "r" not in processor


def test_stop_string_may_stay_in_the_text(processor, tokenizer):
    processor.add("r", PROMPT, SamplingParams(stop="upon a", include_stop_str_in_output=True))
    completion = play(processor, "r", tokenizer.encode("once upon a time"))[-1].output.outputs[0]
    assert completion.text == "once upon a"


def test_stop_string_waits_for_min_tokens(processor, tokenizer):
    ids = tokenizer.encode("once once once")
    processor.add("r", PROMPT, SamplingParams(stop="once", min_tokens=len(ids) - 1, max_tokens=30))
    completion = play(processor, "r", ids)[-1].output.outputs[0]
    assert completion.text.startswith("once once")


def test_stop_string_in_the_last_event_needs_no_abort(processor, tokenizer):
    processor.add("r", PROMPT, SamplingParams(stop="tale"))
    ids = tokenizer.encode("a tale")
    last = play(processor, "r", ids, size=len(ids))[-1]
    assert last.abort == ()
    assert last.output.outputs[0].stop_reason == "tale"
    assert last.output.outputs[0].text == "a "


def test_end_token_is_counted_but_not_shown(processor, tokenizer):
    ids = [*tokenizer.encode("a tale"), 4]
    processor.add("r", PROMPT, SamplingParams(skip_special_tokens=False))
    completion = play(processor, "r", ids, finish="stop")[-1].output.outputs[0]
    assert completion.text == "a tale"
    assert completion.token_ids == tuple(ids)
    assert completion.stop_reason is None


def test_without_detokenization_there_is_no_text(processor, tokenizer):
    processor.add("r", PROMPT, SamplingParams(detokenize=False))
    completion = play(processor, "r", tokenizer.encode("a tale"))[-1].output.outputs[0]
    assert completion.text == ""
    assert len(completion.token_ids) > 0


def test_logprobs_have_the_chosen_token_first(processor, tokenizer):
    chosen, best, second = (tokenizer.encode(t)[0] for t in (" king", " a", " the"))
    processor.add("r", PROMPT, SamplingParams(logprobs=2, prompt_logprobs=1))
    entry = TokenLogprobs(token_ids=(chosen, best, second), logprobs=(-3.0, -0.5, -1.0), rank=9)
    again = TokenLogprobs(token_ids=(best, best, second), logprobs=(-0.5, -0.5, -1.0), rank=1)
    prompt = TokenLogprobs(token_ids=(11, 10), logprobs=(-2.0, -1.0), rank=2)
    processor.update(
        TokensEvent(
            request_id="r#0",
            token_ids=(chosen,),
            logprobs=(entry,),
            prompt_logprobs=(prompt, prompt),
        )
    )
    event = TokensEvent(
        request_id="r#0", token_ids=(best,), logprobs=(again,), finish_reason="length"
    )
    output = processor.update(event).output
    first, last = output.outputs[0].logprobs
    assert list(first) == [chosen, best, second]
    assert [v.rank for v in first.values()] == [9, 1, 2]
    assert first[chosen].decoded_token == " king"
    assert list(last) == [best, second]
    assert last[best].rank == 1
    assert math.isclose(output.outputs[0].cumulative_logprob, -3.5)
    assert output.prompt_logprobs[0] is None
    assert [list(p) for p in output.prompt_logprobs[1:]] == [[11, 10], [11, 10]]


def test_prompt_logprobs_come_once_in_a_stream(processor):
    processor.add("r", PROMPT, SamplingParams(prompt_logprobs=0), kind="delta")
    prompt = (TokenLogprobs(token_ids=(11,), logprobs=(-2.0,), rank=2),) * 2
    first = processor.update(
        TokensEvent(request_id="r#0", token_ids=(20,), prompt_logprobs=prompt, num_cached_tokens=2)
    )
    second = processor.update(TokensEvent(request_id="r#0", token_ids=(20,)))
    assert len(first.output.prompt_logprobs) == 3
    assert first.output.num_cached_tokens == 2
    assert second.output.prompt_logprobs is None


def test_failed_completion_fails_the_request_and_aborts_the_others(processor):
    processor.add("r", PROMPT, SamplingParams(n=3))
    play(processor, "r", [20], index=0)
    update = processor.update(
        TokensEvent(request_id="r#1", finish_reason="error", error="NaN in the logits")
    )
    assert isinstance(update.error, StepFailed)
    assert "NaN" in str(update.error)
    assert update.abort == ("r#2",)
    assert processor.update(TokensEvent(request_id="r#2", token_ids=(20,))) is None


def test_refused_completion_keeps_its_code_and_is_told_the_senders_own_field(processor):
    processor.add("r", PROMPT, SamplingParams(n=2), param="messages")
    refusal = Refusal(message="Too long.", param="prompt", code="too_long", mend="cut", status=413)
    update = processor.update(TokensEvent(request_id="r#0", finish_reason="error", refusal=refusal))
    error = update.error
    assert isinstance(error, RequestError)
    assert (error.param, error.code, error.mend, error.status) == (
        *("messages", "too_long", "cut"),
        413,
    )
    assert update.abort == ("r#1",)


@pytest.mark.parametrize(
    ("limits", "params", "more", "param"),
    [
        ({"max_top_k": 64}, {"top_k": 65}, {}, "top_k"),
        ({"logits_processors": ("a",)}, {"logits_processor": "b"}, {}, "logits_processor"),
        ({"logits_processors": ()}, {"logits_processor": "b"}, {}, "logits_processor"),
        ({}, {}, {"priority": 1}, "priority"),
        ({"priorities": True}, {}, {"priority": 1.5}, "priority"),
        ({"priorities": True}, {}, {"priority": 2**31}, "priority"),
    ],
    ids=["top_k", "unknown", "none-installed", "fcfs", "fraction", "far"],
)
def test_what_the_engine_cannot_serve_is_refused_before_it_starts(
    tokenizer, limits, params, more, param
):
    told = RequestLimits(**limits)
    processor = OutputProcessor(tokenizer, max_model_len=64, limits=told)
    with pytest.raises(RequestError) as caught:
        processor.add("r", PROMPT, SamplingParams(**params), **more)
    assert caught.value.param == param
    assert len(processor) == 0


def test_abort_names_the_completions_that_still_run(processor):
    processor.add("r", PROMPT, SamplingParams(n=2))
    play(processor, "r", [20], index=1)
    assert processor.abort("r") == ("r#0",)
    assert processor.abort("r") == ()


def test_dead_engine_fails_every_request(processor):
    processor.add("a", PROMPT, SamplingParams())
    processor.add("b", PROMPT, SamplingParams())
    updates = processor.fail_all(EngineDead("The engine ended."))
    assert [u.request_id for u in updates] == ["a", "b"]
    assert all(u.finished and isinstance(u.error, EngineDead) for u in updates)
    assert len(processor) == 0


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([4096], {}, "prompt"),
        ([-1], {}, "prompt"),
        (PROMPT, {"stop_token_ids": (5000,)}, "stop_token_ids"),
        (PROMPT, {"allowed_token_ids": (5000,)}, "allowed_token_ids"),
        (PROMPT, {"logit_bias": {5000: 1.0}}, "logit_bias"),
        (PROMPT, {"bad_words_ids": ((10**6,),)}, "bad_words_ids"),
        (PROMPT, {"bad_words_ids": ((5, -1),)}, "bad_words_ids"),
        (PROMPT, {"stop": "x", "detokenize": False}, "stop"),
        (PROMPT, {"bad_words": (" ",)}, "bad_words"),
    ],
    ids=[
        *("empty", "beyond", "negative", "stop-id", "allowed", "bias", "bad-id", "negative-bad-id"),
        *("no-text", "blank-word"),
    ],
)
def test_bad_request_names_its_field_and_starts_nothing(processor, prompt, params, param):
    with pytest.raises(RequestError) as caught:
        processor.add("r", prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert len(processor) == 0


def test_prompt_must_leave_room_for_one_token(processor):
    processor.add("fits", [10] * 63, SamplingParams())
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 64 tokens"):
        processor.add("long", [10] * 64, SamplingParams())


def test_same_id_twice_is_refused(processor):
    processor.add("r", PROMPT, SamplingParams())
    with pytest.raises(RequestError, match="is running"):
        processor.add("r", PROMPT, SamplingParams())


def test_bad_words_are_banned_with_and_without_leading_space(processor, tokenizer):
    (command,) = processor.add("r", PROMPT, SamplingParams(bad_words=("king", " king")))
    texts = {tokenizer.decode(ids) for ids in command.params.bad_words_ids}
    assert texts == {"king", " king"}
    assert tokenize_bad_words(["king"], tokenizer) == command.params.bad_words_ids


def test_bad_word_whose_tokens_the_model_lacks_is_refused(tokenizer):
    processor = OutputProcessor(tokenizer, max_model_len=64, vocab_size=200)
    with pytest.raises(RequestError, match="bad_words has the token id") as caught:
        processor.add("r", [10], SamplingParams(bad_words="king"))
    assert caught.value.param == "bad_words"
    assert len(processor) == 0


@pytest.mark.parametrize(("kind", "served"), [("sentencepiece", True), ("wordpiece", False)])
def test_spaces_between_special_tokens_are_refused_only_where_there_are_some(
    core_of, save_core, tmp_path, kind, served
):
    loaded = Tokenizer.load(save_core(core_of(kind), tmp_path))
    processor = OutputProcessor(loaded, max_model_len=64)
    params = SamplingParams(spaces_between_special_tokens=False)
    if served:
        assert len(processor.add("r", PROMPT, params)) == 1
    else:
        with pytest.raises(RequestError, match="puts spaces"):
            processor.add("r", PROMPT, params)
