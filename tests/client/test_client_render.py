import json
import math
import re

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.client.cli import parse_begin, tls_of, token_text
from sluice.client.items import Answer, RecordItem, ResultItem, TextSpan
from sluice.client.render import TEXT_CHARS_MAX, clock_time, json_line, pretty_answer, pretty_line, printable
from sluice.errors import ConfigError
from sluice.record import Record


def record(**fields: object) -> RecordItem:
    defaults = {"event_time_us": 1_700_000_000_123_456, "text": "disk full"}
    return RecordItem("pi-1", bytes(16), 7, "north", "syslog", 5, Record(**(defaults | fields)))  # type: ignore[arg-type]


def result(**fields: object) -> ResultItem:
    values = dict.fromkeys(ResultItem.__slots__, 0) | {
        "device_id": "pi-1", "spool_id": bytes(16), "sequence": 7, "site": "north", "stream": "syslog",
        "origin": "cloud", "task": "classify", "model": "m", "model_version": "1", "label": "disk", "score": 0.8125,
        "embedding": b"\x01\x02", "truncated": False,
    }  # fmt: skip
    return ResultItem(**(values | fields))  # type: ignore[arg-type]


def test_a_record_is_one_line_with_all_that_matters() -> None:
    line = click.unstyle(pretty_line(record(metrics={"cpu": 0.5}, labels={"core": "1"}, payload=b"abc")))
    assert line == "2023-11-14 22:13:20.123  north/pi-1  syslog  #7  disk full cpu=0.5 core=1 [3 bytes ]"


def test_a_result_is_one_line_with_its_verdict() -> None:
    line = click.unstyle(pretty_line(result(novelty=0.5, origin="site")))
    assert line.endswith("north/pi-1  syslog  #7  disk 0.81  novelty 0.50  (on site)")
    line = click.unstyle(pretty_line(result(task="novelty", label="", score=0.5, novelty=0.5)))
    assert line.endswith("#7  novelty 0.50"), "once"


@given(st.text(max_size=300))
def test_no_text_of_a_device_can_drive_the_terminal(text: str) -> None:
    lines = (
        pretty_line(record(text=text)),
        pretty_line(result(label=text)),
        pretty_answer(Answer(0, text, error=text)),
    )
    for line in lines:
        assert re.sub(r"\x1b\[\d*m", "", line).isprintable()


def test_long_texts_are_cut_and_control_characters_shown() -> None:
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert printable("x" * 500) == "x" * TEXT_CHARS_MAX + "…"


def test_a_time_that_no_calendar_has_is_shown_as_it_is() -> None:
    assert clock_time(2**62) == f"{2**62} us"


def test_json_holds_every_field_on_one_line() -> None:
    line = json_line(record(metrics={"bad": math.nan}, payload=b"\x00", content_type="x/y", text="two\nlines"))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields["metrics"] == {"bad": None}
    assert (fields["kind"], fields["spool_id"], fields["sequence"], fields["payload"]) == (
        "record",
        "00" * 16,
        7,
        "AA==",
    )
    fields = json.loads(json_line(result()))
    assert (fields["kind"], fields["label"], fields["score"]) == ("result", "disk", 0.8125)
    assert fields["embedding"] == "AQI="
    assert json.loads(json_line(Answer(3, "t", error="no", error_code="invalid")))["error_code"] == "invalid"


def test_from_is_a_word_a_time_or_a_token() -> None:
    assert parse_begin("earliest", 0) == {"start": "earliest"}
    assert parse_begin("10m", 1000.0) == {"start": 400_000_000}
    assert parse_begin("2d", 1000.0) == {"start": 0}
    token = bytes(range(70))
    assert parse_begin(token_text(token), 0) == {"resume_token": token}


@pytest.mark.parametrize("text", ["", "yesterday", "10", "10y", "-5m", "!" * 50])
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"latest, earliest.*10m"):
        parse_begin(text, 0)


def test_tls_options_are_checked_before_anything_is_sent(tmp_path) -> None:
    assert tls_of(None, None, None, None) is None
    with pytest.raises(ConfigError, match="go together"):
        tls_of(None, "c.pem", None, None)
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        tls_of(str(tmp_path / "absent.pem"), None, None, None)


def test_an_answer_shows_what_was_found_in_its_text() -> None:
    spans = (TextSpan(0, 4, "PER", 0.75), TextSpan(14, 19, "LOC", 0.5))
    answer = Answer(0, "Anna lives in \x1b[1mm", label="PER", score=0.75, spans=spans)
    assert click.unstyle(pretty_answer(answer)).startswith("PER 0.75  PER 'Anna'  LOC ")
    assert pretty_answer(answer).count("\x1b[1m") == 0
    assert json.loads(json_line(answer))["spans"][0] == {"start": 0, "end": 4, "label": "PER", "score": 0.75}
    assert "spans" not in json.loads(json_line(Answer(0, "x")))
    assert click.unstyle(pretty_answer(Answer(0, "x"), "tokens")) == "nothing found  x"


def test_an_answer_says_what_its_numbers_are() -> None:
    def shown(task: str, **fields: object) -> str:
        return click.unstyle(pretty_answer(Answer(0, "disk full", **fields), task))  # type: ignore[arg-type]

    vector = bytes(2 * 384)
    assert shown("novelty", score=0.375, novelty=0.375) == "novelty 0.38  disk full"
    assert shown("novelty") == "novelty 0.00  disk full", "what was said before"
    assert shown("embed", embedding=vector) == "embedding of 384 numbers (--json shows them)  disk full"
    assert shown("", label="disk", score=0.75) == "disk 0.75  disk full"
    assert shown("classify", label="disk", score=0.75, novelty=0.5, embedding=vector) == (
        "disk 0.75  novelty 0.50  embedding of 384 numbers (--json shows them)  disk full"
    )
