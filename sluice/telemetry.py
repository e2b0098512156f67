"""Telemetry: one event = one JSON log line + one Prometheus counter.

An `Event` is declared once, as a constant beside the code that emits it; `Telemetry.emit` writes the line and counts.
The metric of an event is `sluice_{name}_{unit}_total`. Fields never hold a record's content: logs and metrics may leave
the site.

The HTTP side serves `/metrics`, `/healthz` (the process is alive) and `/readyz` (it can do its work).
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final, Literal, TextIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from sluice.connections import TelemetryConfig
from sluice.errors import ConfigError

Level = Literal["debug", "info", "warning", "error"]
# The label of what came after a metric had all the series that it may have.
OTHER: Final = "(other)"
# What a client of the probes may take to say what it wants.
_REQUEST_TIMEOUT_S: Final = 5.0
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens.

    Attributes:
        name: snake case, noun first: `envelope_quarantined`. It is the log line's `event`.
        unit: what the counter counts: `envelopes`, `bytes`.
        help: the metric's help text.
        labels: the fields that are also metric labels; few values each, never a record's content.
        level: of the log line. Events of the hot path are `debug`.
    """

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    level: Level = "info"

    @property
    def metric(self) -> str:
        """The counter's name."""
        return f"sluice_{self.name}_{self.unit}_total"


class Telemetry:
    """Logs, metrics and probes of one process.

    Args:
        part: `edge`, `gateway` or `central`; on every log line.
        config: level and listening address.
        stream: where log lines go; stderr by default.
    """

    def __init__(self, part: str, config: TelemetryConfig | None = None, stream: TextIO | None = None) -> None:
        self.config = config or TelemetryConfig()
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._counters: dict[str, Counter] = {}
        self._series: dict[Counter, set[tuple[str, ...]]] = {}
        self._ready: dict[str, Callable[[], bool]] = {}
        self._server: _Server | None = None
        self._log = structlog.wrap_logger(
            structlog.WriteLogger(stream or sys.stderr),
            processors=[
                _add_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[self.config.log_level]),
            part=part,
        )

    def emit(self, event: Event, count: int = 1, **fields: Any) -> None:
        """Writes the event's line and adds `count` to its counter.

        Args:
            event: what happened.
            count: how many units.
            fields: context for the log line; those named in `event.labels` label the counter too.
        """
        counter = self._counter(event)
        if event.labels:
            counter = self.series(counter, *(str(fields.get(label, "")) for label in event.labels))
        counter.inc(count)
        # A full disk or a closed pipe behind stderr must not stop the records: the line is lost, the counter is not.
        with contextlib.suppress(OSError, ValueError):
            getattr(self._log, event.level)(event.name, count=count, **fields)

    def expect(self, event: Event, *values: str) -> None:
        """Shows the event's counter before it happens, at 0.

        Args:
            event: what may happen.
            values: that its label may have; it has one label, or none.
        """
        counter = self._counter(event)
        for value in values:
            self.series(counter, value)

    def series(self, counter: Counter, *values: str) -> Counter:
        """The counter's series for these label values.

        Names that devices choose (streams) are labels, so the number of series is bounded: beyond
        `telemetry.series_max` of one metric, new values share the series whose labels are all `OTHER`.
        """
        known = self._series.setdefault(counter, set())
        if values not in known:
            if len(known) >= self.config.series_max:
                values = (OTHER,) * len(values)
            else:
                known.add(values)
        return counter.labels(*values)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge named `sluice_{name}`; the unit comes last in the name."""
        return Gauge(f"sluice_{name}", text, labels, registry=self.registry)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A counter named `sluice_{name}_total` for what is too frequent to be an event (records, bytes)."""
        return Counter(f"sluice_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """A histogram named `sluice_{name}`."""
        return Histogram(f"sluice_{name}", text, labels, buckets=buckets, registry=self.registry)

    def ready_when(self, name: str, check: Callable[[], bool]) -> None:
        """Adds a condition to `/readyz`: ready when all conditions hold. `check` must be quick and thread-safe."""
        self._ready[name] = check

    def readiness(self) -> Mapping[str, bool]:
        """Each condition and whether it holds now; one that cannot be checked does not hold."""
        return {name: _holds(check) for name, check in list(self._ready.items())}

    def listen(self) -> int | None:
        """Serves metrics and probes in a thread, when a port is configured.

        Returns:
            The port, or None when it is off.

        Raises:
            ConfigError: naming the address, when it cannot be bound.
        """
        if self.config.port is None:
            return None
        host, port = self.config.host, self.config.port
        try:
            self._server = make_server(
                host, port, self._application(), server_class=_Server, handler_class=_SilentHandler
            )
        except OSError as error:
            raise ConfigError(
                f"telemetry: cannot listen on {host}:{port}: {error.strerror}; set telemetry.port to a free port"
            ) from error
        self._server.connections_max = self.config.connections_max
        threading.Thread(target=self._server.serve_forever, name="telemetry", daemon=True).start()
        return int(self._server.server_port)

    def close(self) -> None:
        """Stops serving."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _counter(self, event: Event) -> Counter:
        counter = self._counters.get(event.metric)
        if counter is None:
            with self._lock:
                counter = self._counters.get(event.metric) or Counter(
                    event.metric.removesuffix("_total"), event.help, event.labels, registry=self.registry
                )
                self._counters[event.metric] = counter
        return counter

    def _application(self) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
        metrics = make_wsgi_app(self.registry)

        def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "/")
            if path == "/metrics":
                return metrics(environ, start)  # type: ignore[no-any-return]
            if path == "/healthz":
                start("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
            if path == "/readyz":
                state = self.readiness()
                good = all(state.values())
                start("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
                return ["".join(f"{name} {'ok' if ok else 'not ready'}\n" for name, ok in state.items()).encode()]
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics, /healthz or /readyz\n"]

        return application


def _holds(check: Callable[[], bool]) -> bool:
    try:
        return bool(check())
    except Exception:  # noqa: BLE001 - a probe answers; it does not fail
        return False


def _add_level(_logger: Any, method: str, event: Any) -> Any:
    event["level"] = method
    return event


class _Server(ThreadingMixIn, WSGIServer):
    """A slow scraper must not keep a probe waiting; more than `connections_max` of them are hung up on."""

    daemon_threads = True
    connections_max = 1

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, if there may be one more."""
        if self._busy >= self.connections_max:
            self.shutdown_request(request)
            return
        with self._count:
            self._busy += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._busy -= 1

    def server_bind(self) -> None:
        """Binds without looking up the host's name, which hangs where DNS does."""
        self._busy = 0
        self._count = threading.Lock()
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a scraper that hangs up is no news."""


class _SilentHandler(WSGIRequestHandler):
    """No access log: probes come every second. A client that never speaks is cut off."""

    timeout = _REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Says nothing."""
