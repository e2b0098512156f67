"""The demo's client of the feed: counts what arrives, and remembers the last of it for the table.

Runs in a thread of its own, from the earliest message on, and resumes by itself like any client. Bounded: the last
`RESULTS_KEPT` results and the texts of the last `TEXTS_KEPT` records.
"""

import threading
from collections import Counter, OrderedDict, deque
from typing import Final, NamedTuple, Self

from sluice.client import RecordItem, ResultItem, connect
from sluice.errors import SluiceError

RESULTS_KEPT: Final = 6
TEXTS_KEPT: Final = 5_000
_Identity = tuple[str, bytes, int]


class Heard(NamedTuple):
    """A result, and the text it is about; empty when the record stayed on the site or has not come yet."""

    result: ResultItem
    text: str


class Listener:
    """Use in a `with` block.

    Args:
        target: host:port of the feed.
    """

    def __init__(self, target: str) -> None:
        self.records = 0
        self.results = 0
        self.labels: Counter[str] = Counter()
        self.error: SluiceError | None = None
        self._last: deque[ResultItem] = deque(maxlen=RESULTS_KEPT)
        self._texts: OrderedDict[_Identity, str] = OrderedDict()
        self._lock = threading.Lock()
        self._client = connect(target)
        self._subscription = self._client.subscribe(start="earliest")
        self._thread = threading.Thread(target=self._listen, name="feed-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._subscription.close()
        self._client.close()
        self._thread.join(timeout=5.0)

    def last(self) -> list[Heard]:
        """The newest results, the newest first."""
        with self._lock:
            return [Heard(r, self._texts.get((r.device_id, r.spool_id, r.sequence), "")) for r in reversed(self._last)]

    def _listen(self) -> None:
        try:
            for item in self._subscription:
                with self._lock:
                    self._note(item)
        except SluiceError as error:
            self.error = error

    def _note(self, item: RecordItem | ResultItem) -> None:
        if isinstance(item, ResultItem):
            self.results += 1
            self.labels[item.label] += 1
            self._last.append(item)
            return
        self.records += 1
        if item.record.text:
            self._texts[item.device_id, item.spool_id, item.sequence] = item.record.text
            while len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
