"""How many padded tokens a batch may have, as far as the device's memory is concerned. Pure.

The limit starts from the measured peaks of warm-up batches (bytes per padded token, the worst seen) and the
memory that is free, with a margin. Out of memory lowers it below what failed; it recovers slowly, since
what was short (another process, a fragmented allocator) may pass. It never falls below one row, which is
always tried.
"""

from typing import Final

# After a failure: below what failed by this much. After this many good batches at the limit: up again by as
# much.
SHRINK: Final = 0.5
RECOVER_AFTER: Final = 200


class Admission:
    """The limit of padded tokens per batch.

    Args:
        tokens_max: from the cost model; the limit never exceeds it.
    """

    def __init__(self, tokens_max: int) -> None:
        self._ceiling = tokens_max
        self._limit = tokens_max
        self._good = 0
        self.bytes_per_token = 0.0
        self.shrunk = 0

    @property
    def tokens_max(self) -> int:
        """The limit now; at least 1."""
        return self._limit

    def observe_peak(self, tokens: int, peak_bytes: int, free_bytes: int, share: float) -> None:
        """Takes in a measured batch.

        Args:
            tokens: padded tokens of the batch.
            peak_bytes: what it used above the resting state.
            free_bytes: free at rest.
            share: of the free memory that batches may use.
        """
        if tokens <= 0 or peak_bytes <= 0:
            return
        self.bytes_per_token = max(self.bytes_per_token, peak_bytes / tokens)
        fits = int(free_bytes * share / self.bytes_per_token)
        self._ceiling = max(1, min(self._ceiling, fits))
        self._limit = min(self._limit, self._ceiling)

    def succeeded(self) -> None:
        """A batch ran. After enough of them a lowered limit rises a step."""
        if self._limit >= self._ceiling:
            return
        self._good += 1
        if self._good >= RECOVER_AFTER:
            self._good = 0
            self._limit = min(self._ceiling, max(self._limit + 1, int(self._limit / SHRINK)))

    def failed(self, tokens: int) -> None:
        """A batch of `tokens` padded tokens did not fit."""
        self._good = 0
        self.shrunk += 1
        self._limit = max(1, min(self._limit, int(tokens * SHRINK)))
