"""A prompt far beyond the context is not read to its end, and one that fits never is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.errors import RequestError
from tokenry.hub import find_model
from tokenry.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(find_model("demo", None))


@settings(max_examples=60, deadline=None)
@given(
    piece=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    length=st.integers(1, 9000),
    context=st.sampled_from([4, 64, 300]),
)
def test_only_what_does_not_fit_is_refused(tokenizer, piece, length, context):
    text = (piece * length)[:length]
    whole = tokenizer.encode(text)
    assert tokenizer.within(context).encode(text, whole=True) == whole
    try:
        assert tokenizer.within(context).encode(text) == whole
    except RequestError as error:
        assert len(whole) > context
        assert error.code == "context_length_exceeded"


def test_the_refusal_names_the_field_and_the_figures(tokenizer):
    with pytest.raises(RequestError, match=r"first 2048 of your prompt's 3000000 char") as error:
        tokenizer.within(64).encode("a" * 100 + "\n" * 2_999_900, param="inputs")
    assert error.value.param == "inputs"
    with pytest.raises(RequestError, match="UTF-8"):
        tokenizer.encode("\ud800" * 5000)
