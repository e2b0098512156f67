"""The newest output is kept, within the limit."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sluice.demo.bounded_log import BoundedLog, tail


@given(chunks=st.lists(st.binary(max_size=60), max_size=40), bytes_max=st.integers(2, 100))
def test_both_halves_stay_within_the_limit_and_end_with_the_newest(
    chunks: list[bytes], bytes_max: int, tmp_path_factory
) -> None:
    log = BoundedLog(tmp_path_factory.mktemp("log") / "x.log", bytes_max)
    for chunk in chunks:
        log.write(chunk)
    log.close()
    older = log.older_path.read_bytes() if log.older_path.exists() else b""
    kept = older + log.path.read_bytes()
    assert len(kept) <= bytes_max
    half = bytes_max // 2
    assert kept.endswith(b"".join(chunk[-half:] for chunk in chunks)[-half:]) or len(kept) < half
    newest = next((chunk for chunk in reversed(chunks) if chunk), b"")
    assert kept.endswith(newest[-half:])


def test_a_restart_appends(tmp_path: Path) -> None:
    for text in (b"first\n", b"second\n"):
        log = BoundedLog(tmp_path / "x.log", 1000)
        log.write(text)
        log.close()
    assert tail(tmp_path / "x.log") == "first\nsecond"


def test_a_full_disk_is_counted_and_does_not_raise() -> None:
    log = BoundedLog(Path("/dev/full"), 1000)
    log.write(b"x" * 10)
    assert log.bytes_dropped == 10
    log.close()


def test_the_tail_of_a_missing_log_is_empty_and_of_a_broken_one_readable(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == ""
    (tmp_path / "bad").write_bytes(b"a\n\xff\nb")
    assert tail(tmp_path / "bad", lines_max=2) == "�\nb"
