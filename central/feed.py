"""The feed: `sluice.v1.Feed` with health and reflection, on grpc.aio.

A record's way: Kafka -> `feed_log` (reader) -> `feed_hub` (rings) -> `feed_subscribe` (positions) -> `feed_batches`
(bytes) -> the client. `feed_analyze` and `feed_generate` serve online inference.

Bounded: subscriptions, calls of Analyze and Generate, and messages by `feed.*_max`; per slow client one message plus
gRPC's own window, and one that takes nothing for `feed.stall_deadline_s` is cut off (RESOURCE_EXHAUSTED). A subscriber
loses nothing: it resumes with the token of the last message it received.

Status codes: `feed_status`.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from central.config import FeedConfig
from central.feed_analyze import Analyzer, AnalyzeStream
from central.feed_generate import GENERATE_FAILED, Generating, generated
from central.feed_hub import FeedHub
from central.feed_start import resolve
from central.feed_status import status_of
from central.feed_subscribe import Maker, Subscription
from central.filters import FeedFilter
from central.token_key import load_key
from central.tokens import TokenSigner
from protos import feed_pb2
from sluice.codec import Limits
from sluice.config import read_secret
from sluice.connections import KafkaConfig
from sluice.errors import Backpressure, ConfigError, Permanent, Retryable, SluiceError
from sluice.telemetry import Event, Telemetry

if TYPE_CHECKING:
    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]

LISTENING = Event(name="feed_listening", unit="listeners", help="Times that the feed began to listen.")
SUBSCRIBED = Event(
    name="feed_subscribed", unit="subscriptions", help="Subscriptions that began.", labels=("start",), level="debug"
)
REFUSED = Event(
    name="feed_refused", unit="streams", help="Streams that ended with an error.", labels=("code",), level="warning"
)
STALLED = Event(
    name="feed_stalled",
    unit="subscriptions",
    help="Subscribers and readers of generated text cut off because they took nothing.",
    level="warning",
)

SERVICE: Final = "sluice.v1.Feed"
FILTER_BYTES_MAX: Final = 256 * 1024
KAFKA_WAIT_S: Final = 10.0
LAST_MESSAGES_S: Final = 1.0


class FeedEngine(Analyzer, Generating, Protocol):
    """What the feed needs of the engine."""


class Feed:
    """The service. `drain` sends every subscription its token and ends it with OK.

    Args:
        config: the feed's section.
        kafka: how to reach it.
        limits: of envelopes.
        state_dir: where the token key is kept when none is configured.
        telemetry: for events and gauges.
        engine: for Analyze and Generate; None answers them with UNIMPLEMENTED.
    """

    name: Final = "feed"

    def __init__(
        self,
        config: FeedConfig,
        kafka: KafkaConfig,
        limits: Limits,
        state_dir: str,
        telemetry: Telemetry,
        engine: FeedEngine | None = None,
    ) -> None:
        self.port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._config = config
        self._kafka = kafka
        self._telemetry = telemetry
        self._engine = engine
        self._signer = TokenSigner(load_key(config.token_key_file, state_dir))
        self._hub = FeedHub(kafka, config, telemetry)
        self._maker = Maker(config, limits, telemetry)
        self._draining = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._ended = asyncio.Event()
        self._left = asyncio.Event()
        self._subscribers = 0
        self._cut_off = 0
        self._analyze_streams = 0
        self._generate_calls = 0
        self._messages = telemetry.counter("feed_messages", "Messages that subscribers took.")
        self._bytes = telemetry.counter("feed_bytes", "Bytes that subscribers took.")
        telemetry.gauge("feed_subscribers", "Subscriptions now.").set_function(lambda: self._subscribers)
        telemetry.gauge("feed_cut_off_streams", "Stalled streams whose status waits to be taken.").set_function(
            lambda: self._cut_off
        )
        telemetry.gauge("feed_analyze_streams", "Analyze streams now.").set_function(lambda: self._analyze_streams)
        telemetry.gauge("feed_generate_calls", "Generate calls now.").set_function(lambda: self._generate_calls)

    @property
    def ready(self) -> bool:
        """Whether clients can subscribe now."""
        return self.port.done() and self._hub.ready.is_set() and not self._draining.is_set()

    async def run(self) -> None:
        """Serves until drained."""
        if self._draining.is_set():
            return
        from grpc_health.v1 import health

        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = self._build_server(self._health)
        await self._server.start()
        self._telemetry.emit(LISTENING, address=f"{self._config.host}:{self.port.result()}")
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(work) for work in (self._hub.run(), self._report_health(), self._ended.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await self._server.stop(None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, deadline_s: float) -> None:
        """Refuses new calls, gives every subscription its token, answers what the engine has begun, then ends.

        A text may take longer than there is time: half of it is waited, so that whoever is drained next has some.
        """
        if self._draining.is_set():
            return
        self._draining.set()
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            self._hub.drain("the server is shutting down")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s / 2):
                    await self._wait_until_idle()
            # The last messages are on their way; whoever does not take them must not hold up the end.
            await self._server.stop(LAST_MESSAGES_S)
        self._ended.set()

    async def subscribe(self, request: feed_pb2.SubscribeRequest, context: "Context") -> None:
        """`Feed.Subscribe`."""
        async with self._answering(context):
            self._check_room()
            self._subscribers += 1
            try:
                await self._send_all(request, context)
            finally:
                self._subscribers -= 1
                self._left.set()

    async def analyze(self, requests: AsyncIterator[feed_pb2.AnalyzeRequest], context: "Context") -> None:
        """`Feed.Analyze`."""
        async with self._answering(context):
            engine = self._engine or await _no_engine(context)
            if self._analyze_streams >= self._config.analyze_streams_max:
                text = f"{self._config.analyze_streams_max} streams are open already (feed.analyze_streams_max)"
                raise Backpressure(text, retry_after_s=1.0)
            self._analyze_streams += 1
            try:
                stream = AnalyzeStream(engine, self._config, self._telemetry, context.write)
                await stream.serve(requests, self._draining)
            finally:
                self._analyze_streams -= 1
                self._left.set()

    async def generate(self, request: feed_pb2.GenerateRequest, context: "Context") -> None:
        """`Feed.Generate`."""
        async with self._answering(context, GENERATE_FAILED):
            engine = self._engine or await _no_engine(context)
            if self._generate_calls >= self._config.generate_calls_max:
                text = f"{self._config.generate_calls_max} calls are open already (feed.generate_calls_max)"
                raise Backpressure(text, retry_after_s=1.0)
            self._generate_calls += 1
            try:
                async with contextlib.aclosing(generated(engine, request, self._config)) as messages:
                    async for message in messages:
                        await self._write(context, message)
            finally:
                self._generate_calls -= 1
                self._left.set()

    async def _send_all(self, request: feed_pb2.SubscribeRequest, context: "Context") -> None:
        subscription = await self._open(request)
        async with contextlib.aclosing(subscription.messages()) as messages:
            async for message in messages:
                await self._write(context, message)
                self._messages.inc()
                self._bytes.inc(len(message))

    async def _open(self, request: feed_pb2.SubscribeRequest) -> Subscription:
        if request.filter.ByteSize() > FILTER_BYTES_MAX:
            raise Permanent(f"filter: {request.filter.ByteSize()} bytes, allowed are {FILTER_BYTES_MAX}")
        selection = FeedFilter(request.filter)
        try:
            async with asyncio.timeout(KAFKA_WAIT_S):
                await self._hub.ready.wait()
        except TimeoutError:
            raise Retryable("Kafka is away; try again") from None
        point = await resolve(request.start, selection, self._hub, self._signer, self._kafka)
        self._telemetry.emit(SUBSCRIBED, start=request.start.WhichOneof("at") or "latest")
        return Subscription(self._hub, self._maker, self._signer, self._config, selection, point)

    def _check_room(self) -> None:
        limit = self._config.subscribers_max
        if self._subscribers >= limit or self._cut_off >= limit:
            text = f"{self._subscribers} subscriptions are open, of {limit} (feed.subscribers_max)"
            raise Backpressure(text, retry_after_s=self._config.heartbeat_s)

    async def _write(self, context: "Context", message: Any) -> None:
        try:
            async with asyncio.timeout(self._config.stall_deadline_s):
                await context.write(message)
        except TimeoutError:
            raise _Stalled from None

    async def _wait_until_idle(self) -> None:
        while self._subscribers or self._analyze_streams or self._generate_calls:
            self._left.clear()
            await self._left.wait()

    def _check_open(self) -> None:
        if self._draining.is_set():
            raise Retryable("the server is shutting down")

    @contextlib.asynccontextmanager
    async def _answering(self, context: "Context", failed: Event = REFUSED) -> AsyncIterator[None]:
        """Refuses when draining, and turns our errors into status codes and the event `failed`."""
        from grpc import StatusCode

        try:
            self._check_open()
            yield
        except _Stalled:
            await self._cut_off_stalled(context)
        except SluiceError as error:
            name, text, trailers = status_of(error)
            self._telemetry.emit(failed, code=name.lower(), detail=text, peer=context.peer())
            await context.abort(StatusCode[name], text, trailers)

    async def _cut_off_stalled(self, context: "Context") -> None:
        from grpc import StatusCode

        self._telemetry.emit(STALLED, peer=context.peer())
        # The status waits behind the message that the client does not take; nothing else is held for it meanwhile.
        self._cut_off += 1
        try:
            text = (
                f"nothing was taken for {self._config.stall_deadline_s:g} s; a subscription resumes with its last token"
            )
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, text)
        finally:
            self._cut_off -= 1

    async def _report_health(self) -> None:
        from grpc_health.v1 import health_pb2

        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        while True:
            await self._hub.ready.wait()
            for name in ("", SERVICE):
                await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
            await self._hub.not_ready.wait()
            for name in ("", SERVICE):
                await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    def _build_server(self, health_servicer: Any) -> "grpc.aio.Server":
        import grpc.aio
        from grpc_health.v1 import health, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        config = self._config
        # Streams that stall are counted beside those that are served; the rest is for probes and reflection, which
        # have streams of their own that nobody else would count.
        calls_max = config.analyze_streams_max + config.generate_calls_max
        streams_max = 2 * config.subscribers_max + calls_max + config.probes_max
        server = grpc.aio.server(options=server_options(config), maximum_concurrent_rpcs=streams_max)
        handlers = {
            # Messages are built once and shared: they are bytes already.
            "Subscribe": grpc.unary_stream_rpc_method_handler(
                self.subscribe, request_deserializer=feed_pb2.SubscribeRequest.FromString, response_serializer=None
            ),
            "Analyze": grpc.stream_stream_rpc_method_handler(
                self.analyze,
                request_deserializer=feed_pb2.AnalyzeRequest.FromString,
                response_serializer=feed_pb2.AnalyzeResponse.SerializeToString,
            ),
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate,
                request_deserializer=feed_pb2.GenerateRequest.FromString,
                response_serializer=feed_pb2.GenerateResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self.port.set_result(self._bind(server))
        return server

    def _bind(self, server: "grpc.aio.Server") -> int:
        host, port = self._config.host, self._config.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = server_credentials(self._config)
        try:
            if credentials is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise ConfigError(
                f"feed: cannot listen on {address}: {_why_not(host, port)}; set feed.port to a free port"
            ) from error


class _Stalled(Exception):
    """The client takes nothing."""


async def _no_engine(context: "Context") -> NoReturn:
    from grpc import StatusCode

    await context.abort(StatusCode.UNIMPLEMENTED, "this instance has no engine (roles)")


def server_options(config: FeedConfig) -> list[tuple[str, int]]:
    """GRPC's settings."""
    keepalive_ms = int(config.keepalive_s * 1000)
    return [
        # Without this the server runs megabytes ahead of a slow client.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.max_receive_message_length", config.request_bytes_max),
        # A port that is taken must be an error, not shared with whoever has it.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", keepalive_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may probe as often as every five seconds.
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def server_credentials(config: FeedConfig) -> "grpc.ServerCredentials | None":
    """TLS as configured; None without.

    Raises:
        ConfigError: naming a file that cannot be read.
    """
    import grpc

    certificate = read_secret(config.certificate_file, "feed.certificate_file")
    key = read_secret(config.key_file, "feed.key_file")
    authority = read_secret(config.ca_file, "feed.ca_file")
    if certificate is None or key is None:
        return None
    return grpc.ssl_server_credentials(
        [(key.encode(), certificate.encode())],
        root_certificates=authority.encode() if authority else None,
        require_client_auth=authority is not None,
    )


def _why_not(host: str, port: int) -> str:
    """What the operating system says to an attempt to bind."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC refuses"
