"""The books of one `analyze` call: which texts are under way, which answers are due, what is sent again. Pure.

Invariants: every text gets exactly one answer, and one that cannot be sent gets it without asking; answers are given in
the order of the texts; at most `window` texts were sent and not yet given, so memory does not depend on how many texts
there are.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from protos import feed_pb2
from sluice.client.items import Answer, answer_of

ATTEMPTS_MAX: Final = 8
# A request must fit into what a server takes by default (1 MiB, feed.request_bytes_max), with names and numbers beside.
TEXT_BYTES_MAX: Final = (1 << 20) - 4096
# Of a text that is refused for its size, so much comes back with the answer.
_SHOWN_CHARS: Final = 1000

Priority = Literal["online", "background"]


@dataclass(frozen=True, slots=True)
class Ask:
    """How texts are to be analysed."""

    task: str = ""
    stream: str = ""
    priority: Priority = "online"
    deadline_s: float | None = None
    embed: bool = False
    model: str = ""


class Books:
    """See the module's docstring.

    Args:
        texts: read as far as the window allows.
        ask: for all of them.
        window: see the invariants.
    """

    def __init__(self, texts: Iterable[str], ask: Ask, window: int = 32) -> None:
        self._texts = iter(enumerate(texts))
        self._ask = ask
        self._window = window
        self._sent: dict[int, tuple[str, int]] = {}  # text, attempts
        self._ready: dict[int, Answer] = {}
        self._next_out = 0
        self._exhausted = False

    @property
    def finished(self) -> bool:
        """Whether every text was answered."""
        return self._exhausted and not self._sent and not self._ready

    def next_requests(self) -> Iterator[feed_pb2.AnalyzeRequest]:
        """The requests that may be sent now."""
        while not self._exhausted and len(self._sent) + len(self._ready) < self._window:
            following = next(self._texts, None)
            if following is None:
                self._exhausted = True
                return
            index, text = following
            if wrong := refusal(text):
                shown = text[:_SHOWN_CHARS] if isinstance(text, str) else ""
                self._ready[index] = Answer(index, shown, error=wrong, error_code="invalid")
                continue
            self._sent[index] = (text, 1)
            yield self._request(index, text)

    def take(self, response: feed_pb2.AnalyzeResponse) -> tuple[feed_pb2.AnalyzeRequest, float] | None:
        """Notes a response; a request to send again and the delay in seconds, when the server was overloaded."""
        index = int(response.request_id)
        text, attempts = self._sent[index]
        overloaded = response.error.code == feed_pb2.AnalyzeError.CODE_OVERLOADED
        if overloaded and attempts < ATTEMPTS_MAX:
            self._sent[index] = (text, attempts + 1)
            return self._request(index, text), max(0.01, response.error.retry_after_ms / 1000)
        del self._sent[index]
        self._ready[index] = answer_of(index, text, response)
        return None

    def answers(self) -> Iterator[Answer]:
        """The answers that are due now, in order."""
        while self._next_out in self._ready:
            yield self._ready.pop(self._next_out)
            self._next_out += 1

    def advance(self, send: Callable[[feed_pb2.AnalyzeRequest], None]) -> Iterator[Answer]:
        """Sends what may be sent and gives what is due, until more of either needs a response."""
        moved = True
        while moved:
            moved = False
            for request in self.next_requests():
                send(request)
            for answer in self.answers():
                moved = True
                yield answer

    def _request(self, index: int, text: str) -> feed_pb2.AnalyzeRequest:
        ask = self._ask
        return feed_pb2.AnalyzeRequest(
            request_id=str(index),
            text=text,
            task=ask.task,
            stream=ask.stream,
            priority=priority_of(ask.priority),
            # 0 would be the server's default.
            deadline_ms=0 if ask.deadline_s is None else max(1, round(ask.deadline_s * 1000)),
            want_embedding=ask.embed,
            model=ask.model,
        )


def priority_of(name: Priority) -> feed_pb2.Priority:
    """As it is on the wire."""
    return feed_pb2.PRIORITY_ONLINE if name == "online" else feed_pb2.PRIORITY_BACKGROUND


def refusal(text: object) -> str:
    """Why a text cannot be sent; empty when it can."""
    if not isinstance(text, str):
        return f"not a text but {type(text).__name__}"
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return f"not valid Unicode at position {error.start}: a byte that is not UTF-8, or a lone surrogate"
    return f"text of {size} bytes exceeds {TEXT_BYTES_MAX}" if size > TEXT_BYTES_MAX else ""
