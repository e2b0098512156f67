"""Who uses the host thread next: online before background, all models together. Pure asyncio, no threads.

A turn is one piece of work: preparing a chunk of texts, reading a chunk of results, remembering a batch.

Rules:

* One piece at a time. A turn lasts as long as its piece does, also when its caller was cancelled meanwhile: a thread
  cannot be interrupted. Whoever is cancelled while waiting frees the place at once.
* Online first, in the order of arrival, as background is. But when background waits, online goes on for at most
  `online_batches_max` times as long as the last background piece took: so background has its share of the time, and
  online waits for one piece of background at most now and then, whatever the line is.
* Calls that have not begun are bounded (`calls_waiting_max`, a share of it for online). Later pieces of a call are
  ordered, never refused.

Fails: `run` raises Backpressure for a new call when too many wait, and whatever the piece raises.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from engine.config import EngineConfig
from engine.lane import Priority
from engine.scheduler import RETRY_AFTER_S_MAX, RETRY_AFTER_S_MIN
from sluice.errors import Backpressure

_T = TypeVar("_T")
# Who waits, in the order of arrival, and whether it is a call that has not begun.
_Line = OrderedDict["asyncio.Future[None]", bool]


class Turns:
    """See the module's docstring. Lives on the event loop's thread.

    Args:
        config: the engine's section.
        clock: monotonic seconds.

    Attributes:
        config: may be replaced at any time.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._busy = False
        # While nobody is at it, nobody waits.
        self._lines: dict[Priority, _Line] = {priority: OrderedDict() for priority in Priority}
        self._calls = 0
        self._piece_s = 0.0
        self._background_s = 0.0  # how long the last piece of background took
        self._online_s = 0.0  # how long online went on since then while background waited

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    async def run(self, priority: Priority, start: Callable[[], "asyncio.Future[_T]"], *, new: bool = False) -> _T:
        """The result of a piece of work, which is begun when it is its turn.

        Args:
            priority: of the call.
            start: begins the work; called once, at its turn, or never. It may raise to give the turn up.
            new: the first piece of a call: it may be refused.

        Raises:
            Backpressure: too many new calls wait.
        """
        if new:
            self._admit(priority)
        await self._turn(priority, new=new)
        begun_s = self._clock()
        try:
            work = start()
        except BaseException:
            self._pass()
            raise
        # Before the callback that passes the turn on, so that this caller goes on before the next one begins.
        result = asyncio.shield(work)
        work.add_done_callback(lambda work: self._ended(work, priority, self._clock() - begun_s))
        return await result

    def _admit(self, priority: Priority) -> None:
        limit = self.config.calls_waiting_max
        if priority is Priority.BACKGROUND:
            limit = max(1, int(limit * (1 - self.config.online_share)))
        if self._calls >= limit:
            # Until half of the line is gone, roughly.
            delay_s = min(max(self._piece_s * len(self) / 2, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)
            raise Backpressure(
                f"{self._calls} calls wait to be prepared, at most {limit} of this priority may "
                "(engine.calls_waiting_max)",
                retry_after_s=delay_s,
            )

    async def _turn(self, priority: Priority, *, new: bool) -> None:
        if not self._busy:
            self._busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        line = self._lines[priority]
        line[turn] = new
        self._calls += new
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass()  # it had become its turn just before
            elif line.pop(turn, None):
                self._calls -= 1
            raise

    def _ended(self, work: "asyncio.Future[_T]", priority: Priority, seconds: float) -> None:
        if not work.cancelled():
            work.exception()  # when its caller has gone nobody else looks at it, and asyncio would log its text
        self._piece_s += (seconds - self._piece_s) / 8
        if priority is Priority.BACKGROUND:
            self._background_s, self._online_s = seconds, 0.0
        elif self._lines[Priority.BACKGROUND]:
            self._online_s += seconds
        self._pass()

    def _pass(self) -> None:
        while line := self._next():
            turn, new = line.popitem(last=False)
            self._calls -= new
            if not turn.done():  # else it was cancelled in this very moment
                turn.set_result(None)
                return
        self._busy = False

    def _next(self) -> _Line:
        online, background = self._lines[Priority.ONLINE], self._lines[Priority.BACKGROUND]
        its_turn = self._online_s >= self.config.online_batches_max * self._background_s
        return background if background and (its_turn or not online) else online
