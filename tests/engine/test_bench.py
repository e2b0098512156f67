"""What the bench counts, on an engine that refuses."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from engine.bench import _open_loop
from sluice.errors import Backpressure, Retryable

RETRY_S = 0.02


class Refusing:
    """An engine that refuses a call three times before it answers."""

    def __init__(self) -> None:
        self.asked: dict[object, int] = {}
        self.answered = 0

    async def analyze(self, texts: Sequence[str], **_: object) -> list[Any]:
        task = asyncio.current_task()
        self.asked[task] = self.asked.get(task, 0) + 1
        if self.asked[task] <= 3:
            raise Backpressure("full", retry_after_s=RETRY_S)
        self.answered += 1
        return []


async def test_a_refused_text_counts_when_it_is_answered_and_not_when_it_may_be_sent_again() -> None:
    engine: Any = Refusing()
    latencies, unanswered = await _open_loop(engine.analyze, ["a", "b"], 100.0, 0.2, lambda *_: None)
    assert latencies
    assert (latencies, unanswered) == (sorted(latencies), 0)
    assert engine.answered == len(latencies)
    assert min(latencies) >= 3 * RETRY_S


async def test_an_engine_that_does_not_keep_up_ends_the_measurement_all_the_same() -> None:
    asked = 0

    async def never(_: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            return
        await asyncio.Event().wait()

    latencies, unanswered = await _open_loop(never, ["a"], 100.0, 0.2, lambda *_: None)
    assert (len(latencies), unanswered) == (asked, asked - 1)
    assert unanswered > 1
    assert max(latencies) >= 0.2, "what waits in vain counts with the time that it waited"


async def test_an_error_of_the_engine_is_not_lost() -> None:
    async def broken(_: object) -> None:
        raise Retryable("no device")

    with pytest.raises(Retryable, match="no device"):
        await _open_loop(broken, ["a"], 100.0, 0.2, lambda *_: None)
