"""A file's lines as texts, and the line that says how far one is."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.client.analyzing import TEXT_BYTES_MAX, refusal
from sluice.client.lines import Lines, Progress, progress_line


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20), max_size=30))
def test_every_line_that_is_not_empty_is_given_with_its_number_and_place(texts: list[str]) -> None:
    content = "".join(f"{text}\n" for text in texts).encode()
    lines = Lines(io.BytesIO(content))
    assert list(lines) == [text for text in texts if text]
    ends = [len("".join(f"{text}\n" for text in texts[: i + 1]).encode()) for i in range(len(texts))]
    assert [lines.taken() for text in texts if text] == [(i + 1, ends[i]) for i, text in enumerate(texts) if text]


@given(st.binary(max_size=300))
def test_whatever_the_bytes_are_they_are_read_to_the_end(content: bytes) -> None:
    lines = Lines(io.BytesIO(content))
    found = [text.encode(errors="surrogateescape") for text in lines]
    assert found == [line.rstrip(b"\r\n") for line in content.split(b"\n") if line.rstrip(b"\r\n")]


@pytest.mark.parametrize("size", [TEXT_BYTES_MAX, TEXT_BYTES_MAX + 1, 5_000_000])
def test_a_long_line_is_bounded_and_the_next_one_is_whole(size: int) -> None:
    lines = Lines(io.BytesIO(b"x" * size + b"\r\nnext"))
    long, following = lines
    assert len(long) == min(size, TEXT_BYTES_MAX + 2)
    assert bool(refusal(long)) == (size > TEXT_BYTES_MAX)
    assert following == "next"
    assert [lines.taken(), lines.taken()] == [(1, size + 2), (2, size + 6)]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ((0, 0, 0.0, 0, 0), "0 texts"),
        ((100, 0, 2.0, 0, 0), "100 texts (50/s)"),
        ((2500, 3, 10.0, 250, 1000), "[######------------------]  25%  0:30 left  2,500 texts (250/s)  3 failed"),
        ((1, 0, 3600.0, 1, 4), "[######------------------]  25%  3:00:00 left  1 texts (0/s)"),
        ((9, 0, 3.0, 1000, 1000), "[########################] 100%  9 texts (3/s)"),
        ((9, 0, 3.0, 1500, 1000), "[########################] 100%  9 texts (3/s)"),
    ],
)
def test_the_line_says_how_far_how_fast_and_how_long(state: tuple[int, int, float, int, int], line: str) -> None:
    assert progress_line(*state) == line


def test_the_line_is_written_now_and_then_and_taken_away() -> None:
    now, shown = [0.0], list[str]()
    progress = Progress(shown.append, lambda: now[0], bytes_total=100)
    for i in range(100):
        now[0] = i * 0.01
        progress.answered(i % 10 == 0, i + 1)
    progress.end()
    assert 8 <= len(shown) <= 12
    assert shown[-1] == ""
    assert "failed" in shown[-2]
    assert (progress.count, progress.failed) == (100, 10)
