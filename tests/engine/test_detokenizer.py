"""Streaming text is the whole text, cut in pieces; stop strings do not depend on token borders."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tilestream.engine.detokenizer import Detokenizer


class Pieces:
    """A tokenizer whose tokens are given byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    edges = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:])]


def stream(pieces: list[bytes], stop: tuple[str, ...] = (), **kwargs: bool) -> tuple[list[str], str | None]:
    """The texts as they come, the flushed rest last; and the stop string."""
    detokenizer = Detokenizer(Pieces(pieces), stop, **kwargs)
    texts = []
    for token_id in range(len(pieces)):
        text, found = detokenizer.append(token_id)
        texts.append(text)
        if found is not None:
            return [*texts, detokenizer.flush()], found
    return [*texts, detokenizer.flush()], None


def first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Character by character: (where it begins, the stop string) of the one that ends first, the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def test_characters_wait_for_all_their_bytes() -> None:
    texts, _ = stream([b"a\xf0", b"\x9f", b"\x99", b"\x82b", b"\xc3"])
    assert texts == ["a", "", "", "\U0001f642b", "", "\ufffd"]


def test_impossible_bytes_become_replacements_at_once() -> None:
    texts, _ = stream([b"\xff", b"\xf0\x9fa", b"\x80"])
    assert texts == ["\ufffd", "\ufffda", "\ufffd", ""]


def test_tokens_without_text() -> None:
    assert stream([b"", b"a", b""]) == (["", "a", "", ""], None)


@given(st.one_of(st.binary(max_size=40), st.text(max_size=12).map(str.encode)), st.lists(st.integers(0, 100), max_size=8))
def test_pieces_add_up_to_the_whole(data: bytes, borders: list[int]) -> None:
    texts, _ = stream(cut(data, borders))
    assert "".join(texts) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=12), st.lists(st.integers(0, 100), max_size=8))
def test_valid_text_streams_without_replacements(text: str, borders: list[int]) -> None:
    so_far = ""
    for piece in stream(cut(text.encode(), borders))[0]:
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    pieces = [b"x", b"<", b"e", b"n", b"<en", b"d>y"]
    assert stream(pieces, ("<end>",)) == (["x", "", "", "", "<en", "", ""], "<end>")
    assert stream(pieces[:5], ("<end>",)) == (["x", "", "", "", "<en", "<en"], None)
    assert stream(pieces, ("<end>",), include_stop=True) == (["x", "", "", "", "<en", "<end>", ""], "<end>")


def test_the_longest_possible_beginning_is_held_back() -> None:
    assert stream([b"xab", b"c"], ("abc", "bz")) == (["x", "", ""], "abc")
    assert stream([b"xab", b"c"], ("bz", "abc")) == (["x", "", ""], "abc")


def test_nothing_after_the_stop_string() -> None:
    assert stream([b"ab|cd"], ("|",)) == (["ab", ""], "|")
    assert stream([b"ab|cd\xf0"], ("|",), include_stop=True) == (["ab|", ""], "|")


def test_a_stop_string_whose_characters_come_in_pieces() -> None:
    assert stream([b"a\xe2", b"\x82", b"\xacz"], ("\u20ac",)) == (["a", "", "", ""], "\u20ac")


def test_the_stop_string_that_ends_first_wins() -> None:
    assert stream([b"xabcd"], ("abcd", "b", "bc"))[1] == "b"
    assert stream([b"xabcd"], ("c", "abc", "bc")) == (["x", ""], "abc")


letters = st.text(alphabet="ab\u00e9", max_size=14)
stops = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(letters, stops, st.lists(st.integers(0, 100), max_size=10), st.booleans())
def test_stops_do_not_depend_on_token_borders(
    text: str, stop: tuple[str, ...], borders: list[int], include_stop: bool
) -> None:
    texts, found = stream(cut(text.encode(), borders), stop, include_stop=include_stop)
    expected = first_stop(text, stop)
    if expected is None:
        assert (found, "".join(texts)) == (None, text)
    else:
        begin, longest = expected
        assert found == longest
        assert "".join(texts) == text[: begin + len(longest) * include_stop]
