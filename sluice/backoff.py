"""Exponential back-off with full jitter. Pure, but for the random source that it is handed.

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 ("full jitter"): clients that lost
the same broker at the same moment must not come back at the same moment.
"""

import random


class Backoff:
    """Delays between attempts: uniform in `[0, min(max, first * 2**attempt)]` seconds.

    Args:
        first_s: upper end of the first delay.
        max_s: upper end of all later ones.
        rng: random source; seeded in simulations.
    """

    def __init__(self, first_s: float, max_s: float, rng: random.Random | None = None) -> None:
        assert 0 < first_s <= max_s, "0 < first_s <= max_s"
        self._first_s = first_s
        self._max_s = max_s
        self._rng = rng or random.Random()
        self._attempt = 0

    def next_s(self) -> float:
        """The next delay, in seconds."""
        # 2**63 is far beyond any max_s; the cap keeps the power from growing for ever in a long outage.
        ceiling = min(self._max_s, self._first_s * 2.0 ** min(self._attempt, 62))
        self._attempt += 1
        return self._rng.uniform(0.0, ceiling)

    def reset(self) -> None:
        """Starts again from the first delay, after a success."""
        self._attempt = 0
