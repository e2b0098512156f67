"""Text that comes in pieces is the text that comes at once."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.generation_text import Detokenizer, Stops
from tests.engine.tiny_generation import byte_level

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def fallback() -> Any:
    """As in Llama's first tokenizers: blanks are marks, and unknown characters are spelled as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", *bytes_, "▁", *(chr(code) for code in range(33, 127)), "▁the", "the"]
    fast = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=False
        )
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def pieces(fast: Any, ids: Sequence[int]) -> list[str]:
    subject = Detokenizer(lambda some: fast.decode(list(some), skip_special_tokens=True))
    return [*(subject.push(token) for token in ids), subject.flush()]


@pytest.mark.parametrize("fast", [byte_level(), fallback()], ids=["byte-level", "byte-fallback"])
def test_any_text_comes_out_whole_and_no_piece_holds_half_a_character(fast: Any) -> None:
    @given(TEXTS)
    @example("磁盘已满 🚀👩‍👩‍👧 é\u0301 " * 4)
    @example("  blanks  first")
    def holds(text: str) -> None:
        ids = fast.encode(text).ids
        found = pieces(fast, ids)
        assert "".join(found) == fast.decode(ids)
        assert "\ufffd" in text or "\ufffd" not in "".join(found)

    holds()


@given(st.lists(st.integers(0, 260), max_size=120))
def test_any_tokens_of_a_byte_level_tokenizer_come_out_as_they_are_decoded(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


BYTES = byte_level()


def test_a_character_comes_with_its_last_byte_and_text_without_delay() -> None:
    assert pieces(BYTES, BYTES.encode("a磁b").ids) == ["a", "", "磁", "b", ""]
    assert pieces(BYTES, BYTES.encode("磁").ids[:1]) == ["", "\ufffd"]


def test_tokens_that_are_no_text_at_all_stay_bounded() -> None:
    lengths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return "\ufffd" * len(ids)

    subject = Detokenizer(decode)
    given = "".join(subject.push(7) for _ in range(2000)) + subject.flush()
    assert given == "\ufffd" * 2000
    assert max(lengths) <= 512


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_in_front_of_its_first_stop_however_it_is_cut(text: str, stops: list[str], data: Any) -> None:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    # A stop counts when its last character arrives: the one that ends first, and of those the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    subject, given, rest = Stops(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        given, rest = given + subject.push(rest[:size]), rest[size:]
    given += subject.flush()
    assert subject.reached == bool(ends)
    assert text.startswith(given)
    assert given == text if not ends else len(given) <= min(end for end, _ in ends)
    assert not any(stop in given for stop in stops)
    assert not places or min(places) <= len(given)


def test_what_may_begin_a_stop_is_held_back_and_nothing_else() -> None:
    subject = Stops(["STOP"])
    assert [subject.push(each) for each in ("ab", "S", "T", "x", "ST", "OPy", "z")] == ["ab", "", "", "STx", "", "", ""]
    assert subject.reached
    assert Stops([]).push("anything") == "anything"
