"""Tokenising and the checks before it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokens import Tokenizer, check, content_key
from tests.engine.fakes import byte_tokenizer

LOG_LINE = "Failed password for invalid user admin from 10.0.0.1 port 22 ssh2"


def test_ids_are_those_of_the_plain_tokenizer_one_by_one(minilm: Any, minilm_tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(str(minilm.folder))
    texts = [LOG_LINE, "ok", "磁盘已满", LOG_LINE * 40, "naïve café", "\x00\x01 binary \ufffd"]
    for text, tokens in zip(texts, minilm_tokenizer.encode(texts), strict=True):
        expected = plain(text, truncation=True, max_length=minilm_tokenizer.length_max)["input_ids"]
        assert tokens.ids.tolist() == expected


@given(st.text(min_size=1, max_size=200))
def test_truncation_keeps_head_and_end_marker_and_counts_what_it_drops(text: str) -> None:
    tokenizer = byte_tokenizer(length_max=16)
    (tokens,) = tokenizer.encode([text])
    assert len(tokens.ids) + tokens.dropped == len(text.encode()) + 2
    assert len(tokens.ids) <= 16
    assert (tokens.ids[0], tokens.ids[-1]) == (0, 1)
    assert (tokens.dropped > 0) == (len(text.encode()) > 14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty text"),
        (" \t\n", "empty text"),
        ("a\ud800b", "lone surrogate at position 1"),
        ("x" * 101, "101 bytes exceeds 100"),
        (b"bytes", "not a text but bytes"),
        (None, "not a text but NoneType"),
    ],
)
def test_what_cannot_be_analysed_is_named(text: object, message: str) -> None:
    data, error = check(text, 100)
    assert message in error
    assert data == b""


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Zs", "Cc"]), min_size=1, max_size=25))
def test_any_valid_text_passes(text: str) -> None:
    assert check(text, 100) == (text.encode(), "") or text.isspace()


def test_the_version_changes_with_vocabulary_and_limit() -> None:
    from tokenizers import AddedToken

    base = byte_tokenizer(64)
    other = byte_tokenizer(64)
    other._backend.add_tokens([AddedToken("failed")])
    assert base.version == byte_tokenizer(64).version
    assert base.version != byte_tokenizer(32).version
    assert base.version != Tokenizer(other._backend, 64).version


def test_equal_texts_have_equal_keys_of_16_bytes() -> None:
    assert content_key(b"a") == content_key(b"a") != content_key(b"b")
    assert len(content_key(b"a")) == 16
