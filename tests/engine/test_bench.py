"""What the bench counts, on an engine that refuses."""

import asyncio
from collections.abc import Sequence
from typing import Any

from engine.bench import _open_loop
from sluice.errors import Backpressure

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
    latencies = await _open_loop(engine, ["a", "b"], 100.0, 0.2, lambda *_: None)
    assert latencies
    assert engine.answered == len(latencies)
    assert min(latencies) >= 3 * RETRY_S
