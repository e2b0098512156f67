"""Configuration of central: which roles a process plays, and each role's section. Imports no heavy library."""

import ipaddress
from typing import Annotated, Literal

from msgspec import Meta, field

from central.lake.config import LakeConfig
from engine.config import EngineConfig
from sluice.codec import Limits
from sluice.config import Section
from sluice.connections import KafkaConfig, TelemetryConfig
from sluice.errors import ConfigError
from sluice.kafka_client import TopicsConfig

Role = Literal["lake", "analysis", "feed"]
ROLES: tuple[Role, ...] = ("lake", "analysis", "feed")
KIB = 1024
MIB = 1024 * KIB


class AnalysisConfig(Section, frozen=True, kw_only=True):
    """Texts of the stream through the engine, into the results topic."""

    group_id: Annotated[str, Meta(min_length=1, description="Consumer group.")] = "sluice-analysis"
    streams: Annotated[
        tuple[str, ...],
        Meta(description="Globs of the streams whose texts are analysed; records without text are not."),
    ] = ("*",)
    task: Annotated[str, Meta(min_length=1, description="The engine's task: classify, embed, novelty or tokens.")] = (
        "classify"
    )
    model: Annotated[str, Meta(description="One of engine.models; empty: the default one that offers the task.")] = ""
    embed: Annotated[bool, Meta(description="Whether results carry the embedding.")] = False
    in_flight_envelopes_max: Annotated[int, Meta(ge=1, description="Envelopes worked on at once.")] = 8
    in_flight_texts_max: Annotated[
        int, Meta(ge=1, description="Texts worked on at once; an envelope with more is worked on alone.")
    ] = 20_000
    prefetch_bytes_max: Annotated[int, Meta(ge=MIB, description="What the Kafka client may hold ahead of us.")] = (
        16 * MIB
    )
    result_batch_bytes_max: Annotated[
        int, Meta(ge=KIB, description="Results of one envelope are cut into messages of about this size.")
    ] = 512 * KIB
    commit_interval_s: Annotated[float, Meta(gt=0, description="How often offsets are committed.")] = 1.0
    retry_delay_s_max: Annotated[float, Meta(gt=0, description="Longest back-off when engine or Kafka fails.")] = 10.0


class FeedConfig(Section, frozen=True, kw_only=True):
    """The gRPC service that clients consume."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0: any free one.")] = 7443
    certificate_file: Annotated[str | None, Meta(description="Server certificate (PEM); switches TLS on.")] = None
    key_file: Annotated[str | None, Meta(description="Its key (PEM).")] = None
    ca_file: Annotated[
        str | None, Meta(description="CA of client certificates (PEM); clients must then present one (mTLS).")
    ] = None
    allow_insecure_remote: Annotated[
        bool, Meta(description="Serve without TLS on an address that others can reach.")
    ] = False
    token_key_file: Annotated[
        str | None,
        Meta(description="64 hex digits that sign resume tokens, the same for all instances; None: made in state_dir."),
    ] = None

    subscribers_max: Annotated[int, Meta(ge=1, description="Subscriptions at once; more are refused.")] = 256
    catch_up_max: Annotated[int, Meta(ge=1, description="Subscriptions that read older data from Kafka at once.")] = 16
    catch_up_wait_s: Annotated[float, Meta(gt=0, description="How long one more waits for its turn.")] = 10.0
    ring_bytes_max: Annotated[
        int, Meta(ge=MIB, description="Newest data kept for subscribers, all partitions together.")
    ] = 64 * MIB
    part_cache_bytes_max: Annotated[int, Meta(ge=0, description="Built messages kept for the next subscriber.")] = (
        64 * MIB
    )
    read_ahead_bytes_max: Annotated[int, Meta(ge=MIB, description="What the reader's Kafka client may hold.")] = (
        16 * MIB
    )
    batch_bytes_max: Annotated[
        int,
        Meta(ge=KIB, le=8 * MIB, description="Larger envelopes are cut; gRPC clients read 4 MiB by default."),
    ] = MIB
    message_bytes_max: Annotated[int, Meta(ge=MIB, description="Largest gRPC message that is sent.")] = 16 * MIB
    heartbeat_s: Annotated[float, Meta(gt=0, description="A subscription hears something at least this often.")] = 5.0
    stall_deadline_s: Annotated[
        float, Meta(gt=0, description="A subscriber that takes nothing for so long is cut off; it can resume.")
    ] = 60.0
    keepalive_s: Annotated[float, Meta(ge=1, description="Silence after which a connection is probed.")] = 20.0

    probes_max: Annotated[
        int, Meta(ge=1, description="Calls of health and reflection at once, beside the feed's own.")
    ] = 64
    request_bytes_max: Annotated[int, Meta(ge=KIB, description="Largest request that a client may send.")] = MIB

    analyze: Annotated[
        bool, Meta(description="Serve Analyze and Generate, for which this process loads the engine.")
    ] = True
    analyze_streams_max: Annotated[int, Meta(ge=1, description="Analyze streams at once; more are refused.")] = 256
    analyze_in_flight_max: Annotated[int, Meta(ge=1, description="Requests of one stream worked on at once.")] = 64
    analyze_deadline_ms: Annotated[int, Meta(ge=1, description="Deadline of a request that states none.")] = 10_000
    generate_calls_max: Annotated[int, Meta(ge=1, description="Generate calls at once; more are refused.")] = 64
    generate_deadline_ms: Annotated[
        int, Meta(ge=1, description="Deadline of a whole text, of a Generate call that states none.")
    ] = 120_000


class CentralConfig(Section, frozen=True, kw_only=True):
    """One process of central."""

    roles: Annotated[
        tuple[Role, ...], Meta(min_length=1, description="What this process does: lake, analysis, feed.")
    ] = ROLES
    state_dir: Annotated[
        str, Meta(min_length=1, description="Where this process keeps what must survive it (the token key).")
    ] = ".sluice/central"
    drain_deadline_s: Annotated[float, Meta(gt=0, description="Limit for ending in order.")] = 20.0
    kafka: KafkaConfig = field(default_factory=KafkaConfig)
    topics: TopicsConfig = field(default_factory=TopicsConfig)
    # The gateway compresses anew what it exports, at its own level: an envelope may be larger here than on its way in.
    limits: Limits = field(default_factory=lambda: Limits(envelope_bytes_max=TopicsConfig().message_bytes_max))
    lake: LakeConfig = field(default_factory=LakeConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        """Checks what single fields cannot."""
        if "feed" in self.roles:
            check_feed(self.feed)
        if "analysis" in self.roles:
            check_model(self.analysis, self.engine)


def check_model(analysis: AnalysisConfig, engine: EngineConfig) -> None:
    """Checks that the stream is analysed by a model that is configured.

    Raises:
        ConfigError: naming the keys and the models there are.
    """
    if analysis.model and analysis.model not in engine.names:
        raise ConfigError(
            f"analysis.model: '{analysis.model[:64]}' is none of engine.models; there are {', '.join(engine.names)}"
        )


def check_feed(feed: FeedConfig) -> None:
    """Checks that the feed is not served in the clear by mistake.

    Raises:
        ConfigError: naming the keys.
    """
    if (feed.certificate_file is None) != (feed.key_file is None):
        raise ConfigError("feed.certificate_file and feed.key_file go together")
    if feed.ca_file is not None and feed.certificate_file is None:
        raise ConfigError("feed.ca_file needs feed.certificate_file and feed.key_file")
    if feed.certificate_file is None and not is_loopback(feed.host) and not feed.allow_insecure_remote:
        raise ConfigError(
            f"feed.host {feed.host} can be reached from elsewhere, without TLS: set feed.certificate_file and "
            "feed.key_file, or feed.allow_insecure_remote = true"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
