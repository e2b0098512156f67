"""An engine whose texts are written down, for the tests of the feed's Generate and of its clients."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from engine.generation_request import Answer, Finish, Usage


class Scripted:
    """Says its `pieces`, all but the first when `gate` is set, then ends as `finish`, or raises.

    `asked` is what it was asked for; `running` are the texts under way, `left` those that were, complete or not.
    """

    model = "/models/small"
    model_version = "abc"

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.raises: Exception | None = None
        self.absent: Exception | None = None
        self.finish: Finish = "end"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = 0
        self.left = 0

    @property
    def generator(self) -> "Scripted":
        if self.absent:
            raise self.absent
        return self

    def generate(self, prompt: str, **arguments: Any) -> Answer:
        self.asked.append((prompt, arguments))
        usage = Usage()
        return Answer(self._said(usage), usage)

    async def _said(self, usage: Usage) -> AsyncGenerator[str, None]:
        self.running += 1
        usage.prompt_tokens = 3
        try:
            for piece in self.pieces:
                if usage.new_tokens:
                    await self.gate.wait()
                usage.new_tokens += 1
                yield piece
            if self.raises:
                raise self.raises
            usage.finish = self.finish
        finally:
            self.running -= 1
            self.left += 1
