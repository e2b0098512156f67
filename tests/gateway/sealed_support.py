"""Batches for the sealed store, and a small analyser."""

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.batches import Decision, LocalBatch
from gateway.local_config import LocalConfig
from gateway.sealed import SealedReader, SealedStore
from sluice.record import Record, Route, Sensitivity
from sluice.telemetry import Telemetry

SPOOL = bytes(range(16))
WHY = Decision(Route.LOCAL, "default: found", ("email",))
DAY_MS = 86_400_000


def config(directory: Path, **settings: object) -> LocalConfig:
    values: dict[str, object] = {"key_create": True, "commit_delay_s": 0.0, "retry_after_s": 0.01}
    return LocalConfig(directory=str(directory / "sealed"), **(values | settings))  # type: ignore[arg-type]


def local_batch(
    first: int, count: int, *, device: str = "pump-7", stream: str = "syslog", text: str = "call bob@example.com"
) -> LocalBatch:
    records = [
        Record(
            1_760_000_000_000_000 + i,
            text=f"{text} {i}" if text else "",
            labels={"unit": "pump"},
            metrics={"flow": 1.5},
            payload=b"\x00\xff",
        )
        for i in range(first, first + count)
    ]
    return LocalBatch(
        device_id=device,
        spool_id=SPOOL,
        site="plant",
        stream=stream,
        sensitivity=Sensitivity.UNSPECIFIED,
        received_time_us=1_760_000_001_000_000,
        sequences=tuple(range(first, first + count)),
        frames=tuple(r.to_message().SerializeToString() for r in records),
        why=(WHY,) * count,
    )


class Log:
    """A telemetry whose lines can be asked for."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.telemetry = Telemetry("gateway", stream=self._stream)

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self._stream.getvalue().splitlines()]

    @property
    def text(self) -> str:
        return self._stream.getvalue()


class Clock:
    """Milliseconds that a test moves."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


def open_store(settings: LocalConfig, log: Log | None = None, clock: Clock | None = None) -> SealedStore:
    return SealedStore(settings, (log or Log()).telemetry, *([clock] if clock else []))


def sequences(settings: LocalConfig, device: str = "pump-7") -> list[int]:
    """Of the sealed records, as they are read."""
    reader = SealedReader(settings)
    tables = reader.read_records(["device_id", "sequence"])
    return [row["sequence"] for table in tables for row in table.to_pylist() if row["device_id"] == device]


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - the conditions are of files and counters
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited in vain for: {what}") from None


@dataclass(frozen=True)
class Said:
    label: str
    score: float = 0.9
    novelty: float = 0.1
    token_count: int = 4
    truncated: bool = False
    error: str | None = None
    reason: str = ""
    model: str = "length"
    model_version: str = "1"


class Analyser:
    """Says how long a text is. Can be dead, slow or wrong."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.error: Exception | None = None
        self.hang = self.stopped = False

    async def analyze(self, texts: Sequence[str], *, task: str = "classify", stream: str = "") -> Sequence[Said]:
        if self.hang:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        if self.stopped:
            return [Said("", error="the engine stopped", reason="stopped") for _ in texts]
        self.calls.append(list(texts))
        return [
            Said("bad", error="unreadable", reason="text") if "bad" in t else Said(f"length {len(t)}") for t in texts
        ]

    @property
    def seen(self) -> list[str]:
        return [text for call in self.calls for text in call]
