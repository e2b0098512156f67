"""Group commit: many writes share one file and one fsync.

A write waits until its rows are durable. The first waiting write opens a window of `delay_s`; whatever joins it
meanwhile, up to `commit_bytes_max`, goes into the same commit. What waits is bounded by `pending_bytes_max`.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from sluice.errors import Backpressure, Retryable

T = TypeVar("T")


class GroupCommit(Generic[T]):
    """Batches writes.

    Args:
        commit: makes items durable together; its error is every item's error.
        delay_s: how long the first item waits for others.
        commit_bytes_max: of one commit (one larger item goes alone).
        pending_bytes_max: of all items that wait.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[T]], Awaitable[None]],
        *,
        delay_s: float,
        commit_bytes_max: int,
        pending_bytes_max: int,
    ) -> None:
        self._commit = commit
        self._delay_s = delay_s
        self._commit_bytes_max = commit_bytes_max
        self._pending_bytes_max = pending_bytes_max
        self._waiting: deque[tuple[T, int, asyncio.Future[None]]] = deque()
        self._pending_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._full = asyncio.Event()
        self._closed = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of items that are not durable yet."""
        return self._pending_bytes

    async def write(self, item: T, size_bytes: int) -> None:
        """Returns when the item is durable.

        Raises:
            Backpressure: too much is waiting.
            Retryable: closed.
            SluiceError: as `commit` raises.
        """
        if self._closed:
            raise Retryable("the sealed store is closed")
        if self._pending_bytes and self._pending_bytes + size_bytes > self._pending_bytes_max:
            raise Backpressure(
                f"sealed store: {self._pending_bytes} bytes wait for their commit, local.pending_bytes_max is "
                f"{self._pending_bytes_max}",
                retry_after_s=max(self._delay_s, 0.1),
            )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, size_bytes, done))
        self._pending_bytes += size_bytes
        if self._pending_bytes >= self._commit_bytes_max:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="sealed-commit")
        await done

    async def close(self) -> None:
        """Commits what waits; later writes are refused. Idempotent."""
        self._closed = True
        self._full.set()
        if self._task:
            await self._task

    async def _work(self) -> None:
        while self._waiting:
            if self._pending_bytes < self._commit_bytes_max and not self._closed:
                await self._window()
            await self._commit_group(self._take())
        self._task = None

    async def _window(self) -> None:
        self._full.clear()
        try:
            async with asyncio.timeout(self._delay_s):
                await self._full.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[tuple[T, int, asyncio.Future[None]]]:
        group = [self._waiting.popleft()]
        size = group[0][1]
        while self._waiting and size + self._waiting[0][1] <= self._commit_bytes_max:
            group.append(self._waiting.popleft())
            size += group[-1][1]
        return group

    async def _commit_group(self, group: Sequence[tuple[T, int, "asyncio.Future[None]"]]) -> None:
        error: Exception | None = None
        try:
            await self._commit([item for item, _, _ in group])
        except Exception as raised:  # noqa: BLE001 - it is handed to those who wait, whatever it is
            error = raised
        for _, size, done in group:
            self._pending_bytes -= size
            if done.done():
                # Its writer was cancelled; the rows may be durable, and a resend is recognised by identity.
                continue
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
