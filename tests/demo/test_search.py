"""A planted leak is found, however it is wrapped; what was not planted is not."""

import base64
import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sluice.codec import encode
from sluice.demo.canaries import CARRIERS, Canary, SampleMaker, needles
from sluice.demo.evidence import conclude, search_folder
from sluice.demo.search import TokenSearch
from sluice.record import Record, RecordBatch, Sensitivity, join_frames

TOKEN = "qzvhkrbmfdctdgkw"
NEEDLES = {TOKEN: [TOKEN.encode()]}
# Words in an order without repetition, so that zstd must code letters by their frequency, the token's too.
_PROSE = "all is well at station pump valve line press cell robot belt on of the and to in a was not with"
FILLER = " ".join(random.Random(1).choices(_PROSE.split(), k=600)).encode()


def envelope(text: str) -> bytes:
    records = [Record(1, text=FILLER.decode()), Record(2, text=text)]
    frames = [record.to_message().SerializeToString() for record in records]
    batch = RecordBatch(
        device_id="press-7",
        spool_id=b"\1" * 16,
        first_sequence=0,
        record_count=2,
        stream="logs",
        site="plant",
        data=join_frames(frames),
        sensitivity=Sensitivity.INTERNAL,
    )
    return encode(batch).payload


def parquet(text: str) -> bytes:
    labels = pa.array([[("note", text)], [("note", FILLER.decode())]], pa.map_(pa.string(), pa.string()))
    sink = pa.BufferOutputStream()
    # Without statistics, which would hold it uncompressed.
    pq.write_table(pa.table({"labels": labels}), sink, compression="zstd", write_statistics=False)
    return sink.getvalue().to_pybytes()


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "raw": lambda b: b"before " + b + b" behind",
    "upper case": bytes.upper,
    "hex": lambda b: b"{" + b.hex().encode() + b"}",
    "hex upper case": lambda b: b.hex().upper().encode(),
    "base64": base64.b64encode,
    "base64, shifted by 1": lambda b: base64.b64encode(b"x" + b + b"yz"),
    "base64, shifted by 2": lambda b: base64.urlsafe_b64encode(b"xy" + b + b"z"),
    "zstd": lambda b: b"\0\1" + zstandard.compress(FILLER + b) + b"tail",
    "zstd in zstd": lambda b: zstandard.compress(b"head" + zstandard.compress(FILLER + b)),
    "gzip": lambda b: b"head" + gzip.compress(FILLER + b),
    "base64 in zstd": lambda b: zstandard.compress(base64.b64encode(FILLER + b)),
    "zstd envelope": lambda b: envelope(b.decode()),
    "parquet": lambda b: parquet(b.decode()),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_planted_token_is_found(wrap: Callable[[bytes], bytes]) -> None:
    search = TokenSearch(NEEDLES)
    search.search(wrap(TOKEN.encode()), "kafka", "t/0@1")
    assert search.found.places == {TOKEN: {"kafka": ["t/0@1"]}}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_token_that_is_not_there_is_not_found(wrap: Callable[[bytes], bytes]) -> None:
    search = TokenSearch(NEEDLES)
    search.search(wrap(TOKEN[::-1].encode()), "kafka", "t/0@1")
    assert search.found.places == {}
    assert search.found.bytes > 0


def test_what_is_wrapped_cannot_be_seen_from_outside() -> None:
    # Else finding it would not show that wrappings are opened.
    for name in ("hex", "base64", "zstd", "zstd in zstd", "gzip", "base64 in zstd", "zstd envelope", "parquet"):
        assert TOKEN.encode() not in WRAPPINGS[name](TOKEN.encode()), name


def test_a_frame_over_the_limit_is_counted_not_passed_over() -> None:
    search = TokenSearch(NEEDLES, inflated_bytes_max=1000)
    search.search(zstandard.compress(b"x" * 2000), "lake", "bomb")
    assert search.found.unopened == 1


def test_too_many_frames_are_counted_not_passed_over() -> None:
    search = TokenSearch(NEEDLES, frames_max=3)
    search.search(zstandard.compress(b"x") * 5, "lake", "frames")
    assert search.found.unopened == 1


def test_a_needle_that_chance_would_find_is_refused() -> None:
    with pytest.raises(AssertionError, match="by chance"):
        TokenSearch({"x": [b"short"]})


@given(noise=st.binary(max_size=300))
def test_any_bytes_can_be_searched(noise: bytes) -> None:
    search = TokenSearch(NEEDLES)
    for prefix in (b"", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08"):
        search.search(prefix + noise + TOKEN.encode(), "kafka", "noise")
    assert search.found.places[TOKEN]["kafka"] == ["noise"]


def test_a_folder_is_searched_with_its_file_names(tmp_path: Path) -> None:
    (tmp_path / f"label={TOKEN}").mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "part.parquet").write_bytes(parquet(TOKEN[::-1]))
    search = TokenSearch({**NEEDLES, TOKEN[::-1]: [TOKEN[::-1].encode()]})
    search_folder(search, tmp_path, "lake")
    assert search.found.places[TOKEN]["lake"] == [f"label={TOKEN} (its name)"]
    assert search.found.places[TOKEN[::-1]]["lake"] == ["deep/part.parquet"]


def test_every_kind_of_canary_is_found_as_written_and_without_separators() -> None:
    canaries = [canary for sample in SampleMaker(3).take(200) for canary in sample.canaries]
    assert {canary.carrier for canary in canaries} == set(CARRIERS)
    for canary in canaries:
        for needle in canary.needles:
            search = TokenSearch(dict(needles(canaries)))
            search.search(b"..." + needle + b"...", "kafka", "t/0@9")
            assert list(search.found.places) == [canary.token]


def test_a_leak_is_reported_with_its_place_and_a_beacon_needs_both_places() -> None:
    leaked, kept = (Canary("email", "text", t, (t.encode(),)) for t in ("leakedleaked", "keptkeptkept"))
    both, one = (Canary("beacon", "text", t, (t.encode(),)) for t in ("bothbothboth", "oneoneoneone"))
    search = TokenSearch(dict(needles([leaked, kept, both, one])))
    search.search(b"leakedleaked bothbothboth oneoneoneone", "kafka", "sluice.records/0@3 value")
    search.search(b"bothbothboth", "lake", "records/x.parquet")
    evidence = conclude(search, [leaked, kept], [both, one])
    assert evidence.leaked == ("email in text found in kafka: sluice.records/0@3 value",)
    assert evidence.beacons_found == 1
    assert evidence.bytes_searched > 0


def test_random_bytes_hold_no_canary() -> None:
    canaries = [canary for sample in SampleMaker(5).take(400) for canary in sample.canaries]
    search = TokenSearch(dict(needles(canaries)))
    search.search(os.urandom(4 << 20), "kafka", "noise")
    search.search(os.urandom(2 << 20).hex().encode(), "kafka", "noise")
    assert search.found.places == {}
