import random
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import feed_pb2
from sluice.backoff import Backoff
from sluice.client.analyzing import ATTEMPTS_MAX, TEXT_BYTES_MAX, Ask, Books, refusal
from sluice.client.requests import Progress, build_filter, build_start
from sluice.errors import Permanent, Retryable

# Lone surrogates included: what a program reads with `surrogateescape` may hold them.
ANY_TEXT = st.text(st.characters(), max_size=5)
BEAT = feed_pb2.Heartbeat(server_time_us=1)


def progress(outage_s_max: float | None = None) -> Progress:
    return Progress(build_filter(), build_start("earliest", None), Backoff(1.0, 8.0, random.Random(7)), outage_s_max)


def test_it_asks_for_what_comes_behind_the_last_message() -> None:
    state = progress()
    assert state.request().start.earliest
    assert state.token is None
    state.received(feed_pb2.FeedBatch(heartbeat=BEAT, resume_token=b"one"))
    assert state.disconnected("UNAVAILABLE", "gone", 0.0) <= 1.0
    assert state.request().start.resume_token == b"one"
    state.received(feed_pb2.FeedBatch(drain=feed_pb2.Drain(), resume_token=b"two"))
    assert state.request().start.resume_token == state.token == b"two"


def test_the_delay_grows_until_a_message_comes_but_a_drain_is_no_success() -> None:
    state = progress()
    delays = []
    for _ in range(200):
        state.received(feed_pb2.FeedBatch(drain=feed_pb2.Drain(), resume_token=b"t"))
        delays.append(state.disconnected("OK", "drained", 0.0))
    assert 4.0 < max(delays) <= 8.0
    state.received(feed_pb2.FeedBatch(heartbeat=BEAT, resume_token=b"t"))
    assert state.disconnected("UNAVAILABLE", "", 0.0) <= 1.0


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "OUT_OF_RANGE", "UNAUTHENTICATED", "UNIMPLEMENTED"])
def test_what_is_wrong_with_the_request_is_not_tried_again(code: str) -> None:
    with pytest.raises(Permanent, match="the token is forged"):
        progress().disconnected(code, "the token is forged", 0.0)


def test_an_outage_is_limited_by_its_own_length_not_by_attempts() -> None:
    state = progress(outage_s_max=10.0)
    state.disconnected("UNAVAILABLE", "", 100.0)
    state.disconnected("UNAVAILABLE", "", 109.0)
    state.received(feed_pb2.FeedBatch(heartbeat=BEAT, resume_token=b"t"))
    state.disconnected("UNAVAILABLE", "", 120.0)
    with pytest.raises(Retryable, match=r"10\.0 s.*refused"):
        state.disconnected("UNAVAILABLE", "refused", 130.0)


def test_starts_are_told_apart() -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    assert build_start("latest", None).latest
    assert build_start(moment, None).time_us == int(moment.timestamp()) * 1_000_000
    assert build_start(5, None).time_us == 5
    assert build_start("earliest", b"t").WhichOneof("at") == "resume_token"
    with pytest.raises(Permanent, match="time zone"):
        build_start(datetime(2026, 1, 2), None)  # noqa: DTZ001 - that is the point
    with pytest.raises(Permanent, match="yesterday"):
        build_start("yesterday", None)  # type: ignore[arg-type]
    with pytest.raises(Permanent, match="kinds"):
        build_filter(kinds=["record"])  # type: ignore[list-item]


@given(st.lists(ANY_TEXT, max_size=60), st.integers(1, 8), st.data())
def test_every_text_gets_one_answer_in_order_whatever_comes_back_first(
    texts: list[str], window: int, data: st.DataObject
) -> None:
    books = Books(iter(texts), Ask(), window)
    waiting: list[feed_pb2.AnalyzeRequest] = []
    answers = list(books.advance(waiting.append))
    while not books.finished:
        assert 0 < len(waiting) <= window
        request = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
        response = feed_pb2.AnalyzeResponse(request_id=request.request_id)
        if data.draw(st.booleans()):
            response.error.code = feed_pb2.AnalyzeError.CODE_OVERLOADED
        else:
            response.result.label = request.text
        again = books.take(response)
        waiting += [again[0]] if again else []
        answers += books.advance(waiting.append)
    assert [answer.text for answer in answers] == texts
    assert [answer.index for answer in answers] == list(range(len(texts)))
    for answer in answers:
        if refusal(answer.text):
            assert (answer.error_code, answer.error) == ("invalid", refusal(answer.text))
        else:
            assert answer.error_code == "overloaded" or answer.label == answer.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", "not valid Unicode at position 1"),
        ("a" * (TEXT_BYTES_MAX + 1), "exceeds"),
        ("ä" * (TEXT_BYTES_MAX // 2 + 1), "exceeds"),
        (None, "not a text but NoneType"),
        (b"bytes", "not a text but bytes"),
    ],
)
def test_a_text_that_cannot_be_sent_is_answered_at_once_and_alone(text: Any, message: str) -> None:
    sent: list[feed_pb2.AnalyzeRequest] = []
    books = Books([text] * 100, Ask(), window=4)
    answers = list(books.advance(sent.append))
    assert (len(answers), sent, books.finished) == (100, [], True)
    assert all(answer.error_code == "invalid" and message in str(answer.error) for answer in answers)
    assert all(len(answer.text) <= 1000 for answer in answers)
    books = Books(["a", text, "a" * TEXT_BYTES_MAX], Ask())
    assert list(books.advance(sent.append)) == []
    assert [request.request_id for request in sent] == ["0", "2"]
    assert sent[1].ByteSize() < 1 << 20


def test_the_shortest_deadline_is_not_taken_for_none() -> None:
    (short,), (none,) = (Books(["text"], Ask(deadline_s=each)).next_requests() for each in (0.0001, None))
    assert (short.deadline_ms, none.deadline_ms) == (1, 0)


def test_an_overloaded_server_is_asked_again_later_but_not_for_ever() -> None:
    books = Books(["text"], Ask(deadline_s=1.5, priority="background", embed=True))
    (request,) = books.next_requests()
    assert (request.deadline_ms, request.priority, request.want_embedding) == (1500, 1, True)
    overloaded = feed_pb2.AnalyzeResponse(
        request_id="0",
        error=feed_pb2.AnalyzeError(code=feed_pb2.AnalyzeError.CODE_OVERLOADED, retry_after_ms=250),
    )
    for _ in range(ATTEMPTS_MAX - 1):
        again = books.take(overloaded)
        assert again is not None
        assert again[1] == 0.25
    assert books.take(overloaded) is None
    (answer,) = books.answers()
    assert answer.error_code == "overloaded"
    assert books.finished
