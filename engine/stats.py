"""The engine's figures: counted once, shown twice (`Engine.stats()` and Prometheus)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.analysis import Analysis
from engine.buckets import reporting_class
from engine.config import REPORTING_CLASSES
from engine.failures import Reason
from engine.fleet import DeviceEvent, DeviceStats, EventKind
from engine.lane import Priority
from engine.prepare import CacheCounts
from engine.runner import Report
from sluice.telemetry import Event, Telemetry

LOADED = Event(name="engine_model_loaded", unit="models", help="Models loaded.", labels=("model",))
TEXT_FAILED = Event(
    name="engine_text_failed", unit="texts", help="Texts that got an error.", labels=("reason",), level="debug"
)
OUT_OF_MEMORY = Event(
    name="engine_batch_split", unit="batches", help="Batches split after a failure of the device.", level="warning"
)
CACHE_DAMAGED = Event(
    name="engine_cache_damaged", unit="entries", help="Cache entries or files that were not usable.", level="warning"
)
REFUSED = Event(
    name="engine_call_refused", unit="calls", help="Calls refused because the queue was full.", level="debug"
)
FAILED = Event(name="engine_failed", unit="models", help="Models whose compute thread died.", level="error")
DEVICE_LOST = Event(
    name="engine_device_lost",
    unit="events",
    help="Devices or worker processes that died or could not be opened anew; their texts are tried elsewhere.",
    labels=("kind",),
    level="warning",
)
DEVICE_BACK = Event(name="engine_device_restored", unit="events", help="Devices that came back.", labels=("kind",))
SWAPPED = Event(name="engine_model_swapped", unit="models", help="Models replaced while at work.", labels=("model",))
# What may happen to a device, by what it is told as.
_DEVICE_EVENTS: Final[dict[Event, tuple[EventKind, ...]]] = {
    DEVICE_LOST: ("lost", "not_restored", "down"),
    DEVICE_BACK: ("restored", "up"),
}
_TASKS: Final = ("classify", "embed", "novelty", "tokens")
# From one cached online text to a long background queue.
_LATENCY_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counts since the start.

    Attributes:
        tokens: that the device computed, without padding.
        tokens_dropped: that truncation took away, of all texts answered.
        batches: per reporting class (32, 64, ...).
        padding_share: of the computed tokens, those that were padding.
        queue_tokens: waiting now.
        device_busy_s: time the devices computed, added up.
        memory_wait_s: time that batches waited for memory.
        devices: figures of each device that runs a model now, its memory among them.
    """

    texts: int = 0
    texts_computed: int = 0
    texts_failed: int = 0
    texts_truncated: int = 0
    texts_coalesced: int = 0
    texts_expired: int = 0
    tokens: int = 0
    tokens_dropped: int = 0
    padded_tokens: int = 0
    padding_share: float = 0.0
    batches: dict[int, int] = field(default_factory=dict)
    batch_splits: int = 0
    queue_tokens: int = 0
    token_cache_hits: int = 0
    token_cache_misses: int = 0
    result_cache_hits: int = 0
    result_cache_misses: int = 0
    device_busy_s: float = 0.0
    memory_wait_s: float = 0.0
    devices: tuple[DeviceStats, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a model, or of several added up.

    Attributes:
        queue_tokens: waiting now.
        busy_s: time the devices computed so far, added up.
        texts_coalesced: that joined one under way, so far.
    """

    queue_tokens: int = 0
    busy_s: float = 0.0
    texts_coalesced: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.queue_tokens + other.queue_tokens,
            self.busy_s + other.busy_s,
            self.texts_coalesced + other.texts_coalesced,
        )


class LiveMetrics(Collector):
    """What is read when somebody asks: the queue, and the devices' memory, which goes with a device that is gone.

    Labels are few: models as configured, their devices, four kinds of figure, the reporting classes.

    Args:
        figures: of all models.
        devices: figures of the devices by model. Both are called on the thread that serves metrics.
    """

    def __init__(
        self, figures: Callable[[], Figures], devices: Callable[[], Mapping[str, Sequence[DeviceStats]]]
    ) -> None:
        self._figures = figures
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        figures = self._figures()
        yield GaugeMetricFamily("sluice_engine_queue_tokens", "Tokens waiting.", figures.queue_tokens)
        yield CounterMetricFamily(
            "sluice_engine_texts_coalesced", "Texts that joined one under way.", figures.texts_coalesced
        )
        yield from self._memory()

    def _memory(self) -> Iterator[GaugeMetricFamily]:
        memory, peak, limit = (
            GaugeMetricFamily(f"sluice_engine_device_{name}", text, labels=("model", "device", *more))
            for name, text, *more in (
                ("memory_bytes", "Memory: allocated, reserved, free, and the peak.", "kind"),
                ("batch_peak_bytes", "Peak of the largest batch at start-up, by length class.", "length"),
                ("batch_tokens_max", "Tokens that a batch may have, as far as memory and launch cost are concerned."),
            )
        )
        for model, devices in self._devices().items():
            for device in devices:
                names = (model, device.name)
                for kind, value in asdict(device.memory).items() if device.memory else ():
                    memory.add_metric((*names, kind), value)
                for length, value in device.peaks.items():
                    peak.add_metric((*names, str(length)), value)
                limit.add_metric(names, device.tokens_max)
        yield from (memory, peak, limit)


class EngineCounters:
    """Counts on the event loop's thread. One per Telemetry: metric names are unique in a registry."""

    def __init__(self, telemetry: Telemetry, classes: Sequence[int] = REPORTING_CLASSES) -> None:
        self.telemetry = telemetry
        self._classes = classes
        self.texts = self.texts_computed = self.texts_failed = self.texts_truncated = 0
        self.texts_expired = 0
        self.tokens = self.tokens_dropped = self.padded_tokens = self.batch_splits = 0
        self.memory_wait_s = 0.0
        self.batches = dict.fromkeys(classes, 0)
        self._seen = CacheCounts()
        self._texts_metric = telemetry.counter("engine_texts", "Texts analysed.", ["task", "priority"])
        self._batches_metric = telemetry.counter("engine_batches", "Batches, by length class.", ["length"])
        self._tokens_metric = telemetry.counter("engine_tokens", "Tokens computed.", ["kind"])
        self._cache_metric = telemetry.counter("engine_cache_lookups", "Cache lookups.", ["cache", "outcome"])
        self._truncated_metric = telemetry.counter("engine_texts_truncated", "Texts that were truncated.")
        self._dropped_metric = telemetry.counter("engine_tokens_dropped", "Tokens that truncation took away.")
        self._busy_metric = telemetry.counter(
            "engine_device_busy_seconds", "Time the device computed.", ["model", "device"]
        )
        self._waited_metric = telemetry.counter("engine_memory_wait_seconds", "Time batches waited for memory.")
        self._latency = telemetry.histogram(
            "engine_call_latency_seconds", "From call to result.", _LATENCY_BUCKETS_S, ["priority"]
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Shows what may be counted before it is: a series that begins with its first event hides that one's rate."""
        for priority in (each.name.lower() for each in Priority):
            self._latency.labels(priority)
            for task in _TASKS:
                self._texts_metric.labels(task, priority)
        for length in self._classes:
            self._batches_metric.labels(str(length))
        for kind in ("real", "padding"):
            self._tokens_metric.labels(kind)
        for cache in ("token", "result"):
            for outcome in ("hits", "misses"):
                self._cache_metric.labels(cache, outcome)
        for event in (OUT_OF_MEMORY, CACHE_DAMAGED, REFUSED, FAILED):
            self.telemetry.expect(event)
        for event, kinds in _DEVICE_EVENTS.items():
            self.telemetry.expect(event, *kinds)
        self.telemetry.expect(TEXT_FAILED, *filter(None, get_args(Reason)))

    def call(self, task: str, priority: str, analyses: Sequence[Analysis], seconds: float) -> None:
        """A call of `analyze` was answered."""
        self.texts += len(analyses)
        self._texts_metric.labels(task, priority).inc(len(analyses))
        self._latency.labels(priority).observe(seconds)
        truncated = sum(analysis.truncated for analysis in analyses)
        self.texts_truncated += truncated
        self._truncated_metric.inc(truncated)
        dropped = sum(analysis.dropped_tokens for analysis in analyses)
        self.tokens_dropped += dropped
        self._dropped_metric.inc(dropped)

    def opened(self, model: str, devices: Sequence[DeviceStats]) -> None:
        """A model is at work, on these devices."""
        for device in devices:
            self._busy_metric.labels(model, device.name)

    def batch(self, model: str, report: Report) -> None:
        """A batch of the model of this name is done."""
        if not report.rows:
            return
        length = reporting_class(report.length, self._classes)
        self.batches[length] += 1
        self.texts_computed += report.rows
        self.tokens += report.tokens
        self.padded_tokens += report.padded_tokens
        self._batches_metric.labels(str(length)).inc()
        self._tokens_metric.labels("real").inc(report.tokens)
        self._tokens_metric.labels("padding").inc(max(0, report.padded_tokens - report.tokens))
        self._busy_metric.labels(model, report.device).inc(max(0.0, report.seconds))
        self._waited_metric.inc(report.waited_s)
        self.memory_wait_s += report.waited_s
        if report.splits:
            self.batch_splits += report.splits
            self.telemetry.emit(OUT_OF_MEMORY, report.splits, rows=report.rows, length=report.length)

    def failed(self, reason: str, texts: int = 1) -> None:
        """Texts got an error; `reason` is one of few words."""
        self.texts_failed += texts
        if reason == "deadline":
            self.texts_expired += texts
        self.telemetry.emit(TEXT_FAILED, texts, reason=reason)

    def device(self, event: DeviceEvent) -> None:
        """Something happened to a device."""
        (told,) = (each for each, kinds in _DEVICE_EVENTS.items() if event.kind in kinds)
        self.telemetry.emit(told, device=event.device, kind=event.kind, detail=event.detail)

    def caches(self, changes: CacheCounts) -> None:
        """Adds what the caches of a model counted since the last time."""
        for cache in ("token", "result"):
            for outcome in ("hits", "misses"):
                name = f"{cache}_{outcome}"
                if new := getattr(changes, name):
                    self._cache_metric.labels(cache, outcome).inc(new)
                    setattr(self._seen, name, getattr(self._seen, name) + new)

    def snapshot(self, figures: Figures, devices: tuple[DeviceStats, ...] = ()) -> EngineStats:
        """All figures now."""
        padding = 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0
        return EngineStats(
            texts=self.texts,
            texts_computed=self.texts_computed,
            texts_failed=self.texts_failed,
            texts_truncated=self.texts_truncated,
            texts_coalesced=figures.texts_coalesced,
            texts_expired=self.texts_expired,
            tokens=self.tokens,
            tokens_dropped=self.tokens_dropped,
            padded_tokens=self.padded_tokens,
            padding_share=max(0.0, padding),
            batches=dict(self.batches),
            batch_splits=self.batch_splits,
            queue_tokens=figures.queue_tokens,
            token_cache_hits=self._seen.token_hits,
            token_cache_misses=self._seen.token_misses,
            result_cache_hits=self._seen.result_hits,
            result_cache_misses=self._seen.result_misses,
            device_busy_s=figures.busy_s,
            memory_wait_s=self.memory_wait_s,
            devices=devices,
        )
