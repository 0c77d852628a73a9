"""Stop strings are found wherever the pieces of text are cut, and never shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.text.stops import StopStrings


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What shows of the text: the stop that ends first counts, the longest of those that end
    together."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_same_as_searching_the_whole_text(pieces, stops, include):
    stream = StopStrings(stops, include_in_output=include)
    whole = "".join(pieces)
    expected, stop = naive(whole, stops, include)
    shown = ""
    for piece in pieces:
        shown += stream.feed(piece)
        assert expected.startswith(shown)
    shown += stream.flush()
    assert (shown, stream.matched) == (expected, stop)


@pytest.mark.parametrize("include", [False, True], ids=["without", "with"])
def test_stop_across_pieces(include):
    stream = StopStrings(["</end>"], include_in_output=include)
    shown = [stream.feed(piece) for piece in ["a<", "/e", "nd", "> and more"]]
    assert shown == ["a", "", "", "</end>" if include else ""]
    assert stream.matched == "</end>"


def test_held_text_is_released_when_the_match_fails():
    stream = StopStrings(["abcd"])
    assert [stream.feed("xabc"), stream.feed("x"), stream.flush()] == ["x", "abcx", ""]


def test_only_what_could_become_a_stop_is_held():
    stream = StopStrings(["aab"])
    assert [stream.feed("aaaa"), stream.flush()] == ["aa", "aa"]


def test_without_stop_strings_everything_passes():
    assert StopStrings([]).feed("all of it") == "all of it"
