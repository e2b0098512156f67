"""Writes the sample stream to the agent's standard input, a line of JSON per record.

A burst first, so that even a short run plants enough, then a steady rate. Runs in a thread, since the pipe blocks while
the agent is behind. What was written is remembered: it is what the search looks for.
"""

import os
import threading
from types import TracebackType
from typing import IO, Final, Self

import msgspec

from sluice.demo.canaries import Canary, SampleMaker

BURST_SAMPLES: Final = 280
RATE_PER_S: Final = 10.0
_TICK_S: Final = 0.5


class Feeder:
    """Use in a `with` block.

    Args:
        pipe: the agent's standard input; closed at the end.
        maker: of the samples.
        burst_samples: written at once.
        rate_per_s: samples a second afterwards.
    """

    def __init__(
        self,
        pipe: IO[bytes],
        maker: SampleMaker,
        *,
        burst_samples: int = BURST_SAMPLES,
        rate_per_s: float = RATE_PER_S,
    ) -> None:
        self.canaries: list[Canary] = []
        self.beacons: list[Canary] = []
        self.written = 0
        self.broken = False
        self._pipe = pipe
        self._maker = maker
        self._burst_samples = burst_samples
        self._rate_per_s = rate_per_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, name="sample-feeder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream: the agent sees the end of its input. Waits a moment for what is being written."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _feed(self) -> None:
        count = self._burst_samples
        per_tick = max(1, round(self._rate_per_s * _TICK_S))
        try:
            while True:
                self._write(count)
                count = per_tick
                if self._stop.wait(_TICK_S):
                    break
        except (OSError, ValueError):
            self.broken = True  # the agent is gone, which others notice and say
        finally:
            try:
                self._pipe.close()
            except OSError:
                self.broken = True

    def _write(self, count: int) -> None:
        for sample in self._maker.take(count):
            line = msgspec.json.encode(sample.record) + b"\n"
            while line:
                line = line[os.write(self._pipe.fileno(), line) :]
            self.written += 1
            self.canaries.extend(sample.canaries)
            self.beacons.extend(sample.beacons)
