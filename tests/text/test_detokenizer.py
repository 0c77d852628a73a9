"""The pieces of the incremental detokenizer join to the decoded whole."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenry.text.detokenizer import make_detokenizer
from tokenry.text.tokenizer import Tokenizer

TEXTS = [
    "once upon a time",
    "naïve café",
    "👩\u200d👩\u200d👧 family",
    "你好，世界",
    "e\u0301\u0323 combining",
    "  two  spaces ",
    "\n\n",
    "",
]
valid_text = st.text(st.characters(exclude_characters="\ufffd", codec="utf-8"), max_size=40)
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def stream(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    detokenizer = make_detokenizer(tokenizer, **options)
    return [*(detokenizer.feed((i,)) for i in ids), detokenizer.flush()]


@relaxed
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_whole_for_random_ids(any_tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=40))
    pieces = stream(any_tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@relaxed
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(TEXTS)))
def test_pieces_join_to_the_whole_for_random_texts(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert "".join(stream(any_tokenizer, ids)) == any_tokenizer.decode(ids)


@relaxed
@given(text=st.one_of(valid_text, st.sampled_from(TEXTS)))
def test_no_piece_holds_part_of_a_character(demo, text):
    ids = demo.encode(text)
    assert all("\ufffd" not in piece for piece in stream(demo, ids))


@relaxed
@given(text=st.text("ab你é🎉 ", max_size=30), parts=st.lists(st.integers(1, 5), max_size=10))
def test_number_of_tokens_per_call_makes_no_difference(any_tokenizer, text, parts):
    ids = any_tokenizer.encode(text)
    detokenizer = make_detokenizer(any_tokenizer)
    joined, at = "", 0
    for size in [*parts, len(ids)]:
        joined += detokenizer.feed(ids[at : at + size])
        at += size
    assert joined + detokenizer.flush() == any_tokenizer.decode(ids)


def test_first_word_after_a_prompt_keeps_its_space(sentencepiece):
    prompt, answer = sentencepiece.encode("once"), sentencepiece.encode("upon a")
    assert "".join(stream(sentencepiece, answer)) == "upon a"
    assert "".join(stream(sentencepiece, answer, prompt_ids=prompt)) == " upon a"


def test_character_begun_by_the_prompt_is_finished_by_the_answer(demo):
    ids = demo.encode("ق")
    assert len(ids) > 1
    assert "".join(stream(demo, ids[1:], prompt_ids=ids[:1])) == "ق"


def test_text_is_shown_as_soon_as_it_is_certain(demo):
    ids = demo.encode("once upon a time")
    assert stream(demo, ids)[:-1] == [demo.token_text(i) for i in ids]


def test_byte_run_is_shown_when_it_ends(sentencepiece):
    emoji = [sentencepiece.core.token_to_id(f"<0x{b:02X}>") for b in "🎉".encode()]
    word = sentencepiece.core.token_to_id("▁king")
    assert stream(sentencepiece, [*emoji, word]) == ["", "", "", "", "🎉 king", ""]


def test_incomplete_character_at_the_end_is_one_replacement_character(demo):
    ids = demo.encode("🎉")[:-1]
    assert "".join(stream(demo, ids)) == "\ufffd"


def test_long_run_without_a_certain_text_is_decoded_a_few_times_only(sentencepiece, monkeypatch):
    byte = sentencepiece.core.token_to_id("<0xFF>")
    calls = []

    def decode(ids, **options):
        calls.append(len(ids))
        return Tokenizer.decode(sentencepiece, ids, **options)

    monkeypatch.setattr(sentencepiece, "decode", decode)
    assert "".join(stream(sentencepiece, [byte] * 5000)) == "\ufffd" * 5000
    assert sum(calls) < 5 * 5000
