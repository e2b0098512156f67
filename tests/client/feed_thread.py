"""A feed in a thread of its own, for clients that block; it can be drained and started again on its port."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from central.feed import Feed
from sluice.demo.loopback import free_port
from tests.central.feed_support import TIMEOUT_S, Topics, running_feed


class FeedThread:
    """See the module's docstring."""

    def __init__(self, topics: Topics, state_dir: Path, engine: Any = None, **settings: Any) -> None:
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        self._arguments = (topics, state_dir, engine)
        self._settings = {"port": self.port, **settings}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._feed: Feed | None = None
        self._stack: contextlib.AsyncExitStack | None = None

    def start(self) -> None:
        self._on_loop(self._start())

    def stop(self) -> None:
        """Drains it."""
        self._on_loop(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    async def _start(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        await self._stack.enter_async_context(running_feed(*self._arguments, **self._settings))

    async def _stop(self) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            await stack.aclose()

    def _on_loop(self, work: Any) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result(2 * TIMEOUT_S)


@contextlib.contextmanager
def feed_thread(topics: Topics, state_dir: Path, engine: Any = None, **settings: Any) -> Iterator[FeedThread]:
    feed = FeedThread(topics, state_dir, engine, **settings)
    try:
        feed.start()
        yield feed
    finally:
        feed.close()
