from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.lm.text import TextStream


class Letters:
    """A decoder whose token i stands for a given string."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def feed(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return ""


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(pieces), stop)
    out = []
    for i in range(len(pieces)):
        out.append(stream.feed(i))
        if stream.stopped:
            return out, stream
    out.append(stream.finish())
    return out, stream


def test_a_stop_string_over_three_tokens():
    out, stream = run(["Hello", " wor", "ld", "! more"], ("world!",))
    assert stream.stopped
    assert stream.text == "Hello "
    assert out == ["Hello", " ", "", ""]


def test_only_what_may_become_a_stop_string_is_held_back():
    out, stream = run(["aab", "c", "aa", "x"], ("aaX",))
    assert out == ["aab", "c", "", "aax", ""]
    assert stream.text == "aabcaax"


def test_the_end_releases_what_was_held():
    out, stream = run(["one\n"], ("\n\n",))
    assert out == ["one", "\n"]
    assert not stream.stopped
    assert stream.text == "one\n"


def test_the_earliest_of_several_stops():
    _, stream = run(["abcdef"], ("def", "bc"))
    assert stream.text == "a"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab ", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_same_as_looking_at_the_whole_text(pieces, stops):
    out, stream = run(pieces, tuple(stops))
    whole = ""
    for piece in pieces:  # the first piece that completes a stop string ends the text
        whole += piece
        found = [at for s in stops if (at := whole.find(s)) >= 0]
        if found:
            whole = whole[: min(found)]
            break
    assert stream.text == whole
    assert "".join(out) == whole
