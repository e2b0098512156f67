"""Configuration of the agent: one TOML file."""

from typing import Annotated, Literal

from msgspec import Meta

from edge.batcher import BatchLimits
from edge.records import StreamKey, frame_bytes_max
from edge.window import WindowLimits
from sluice.codec import KIB, MIB, Limits
from sluice.config import Section
from sluice.connections import MqttConfig, TelemetryConfig
from sluice.errors import ConfigError, Permanent
from sluice.record import Sensitivity, validate_name
from sluice.spool import SpoolConfig


class BatchConfig(Section, frozen=True, kw_only=True):
    """When a batch is closed and made durable. Bytes are uncompressed."""

    bytes_target: Annotated[int, Meta(ge=KIB, description="A batch of this size is closed.")] = 128 * KIB
    bytes_max: Annotated[int, Meta(ge=KIB, description="No batch is larger, unless one record alone is.")] = 256 * KIB
    records_max: Annotated[int, Meta(ge=1, description="No batch has more records.")] = 10_000
    age_s_max: Annotated[float, Meta(gt=0, description="A batch is closed so long after its first record.")] = 1.0
    commit_delay_s: Annotated[
        float, Meta(ge=0, description="Group commit: emit() waits so long for others to share its fsync.")
    ] = 0.005
    compression_level: Annotated[int, Meta(ge=1, le=19, description="zstd level.")] = 1
    pending_bytes_max: Annotated[
        int, Meta(ge=KIB, description="Records taken from sources and not yet durable; then sources wait.")
    ] = 4 * MIB

    def limits(self) -> BatchLimits:
        """For the batcher."""
        return BatchLimits(
            bytes_target=self.bytes_target,
            bytes_max=self.bytes_max,
            records_max=self.records_max,
            age_s_max=self.age_s_max,
            commit_delay_s=self.commit_delay_s,
        )


class UplinkConfig(Section, frozen=True, kw_only=True):
    """The way to the gateway."""

    window_batches_max: Annotated[int, Meta(ge=1, le=65535, description="Batches sent and not acknowledged.")] = 32
    window_bytes_max: Annotated[int, Meta(ge=KIB, description="Their bytes.")] = 4 * MIB
    ack_timeout_s: Annotated[float, Meta(gt=0, description="An unacknowledged batch is sent again after this.")] = 10.0
    ack_timeout_s_max: Annotated[float, Meta(gt=0, description="Longest further delay (full jitter).")] = 120.0
    status_interval_s: Annotated[float, Meta(gt=0, description="Time between two reports of status.")] = 5.0
    status_ranges_max: Annotated[int, Meta(ge=1, description="Unsettled runs in a status.")] = 64

    def limits(self) -> WindowLimits:
        """For the window."""
        return WindowLimits(
            items_max=self.window_batches_max,
            bytes_max=self.window_bytes_max,
            ack_timeout_s=self.ack_timeout_s,
            ack_timeout_s_max=self.ack_timeout_s_max,
        )


class SourceSection(Section, frozen=True, kw_only=True, tag_field="kind"):
    """What every source has.

    `name` identifies the source's place in the spool: give it when two sources share kind and stream, and keep it.
    """

    stream: Annotated[str, Meta(min_length=1, description="Stream of its records.")]
    name: Annotated[str | None, Meta(description="Name of its place in the spool; kind and stream when not set.")] = (
        None
    )
    sensitivity: Annotated[
        Literal["unspecified", "public", "internal", "sensitive"],
        Meta(description="Declared sensitivity; the gateway decides."),
    ] = "unspecified"
    priority: Annotated[int, Meta(ge=0, le=9, description="0 to 9; higher is sent first.")] = 5

    @property
    def key(self) -> StreamKey:
        """What its records have in common."""
        return StreamKey(self.stream, Sensitivity[self.sensitivity.upper()], self.priority)

    @property
    def identity(self) -> str:
        """Prefix of its cursors."""
        kind = self.__struct_config__.tag
        return f"{kind}:{self.name or self.stream}"


class TailConfig(SourceSection, frozen=True, kw_only=True, tag="tail"):
    """Follows log files; one line is one record."""

    paths: Annotated[tuple[str, ...], Meta(min_length=1, description="Files or globs (`**` too).")]
    exclude: Annotated[tuple[str, ...], Meta(description="Globs of file names to leave out.")] = (
        "*.gz", "*.xz", "*.bz2", "*.zst", "*.[0-9]", "*.[0-9][0-9]", "*.old",
    )  # fmt: skip
    start_at: Annotated[
        Literal["beginning", "end"], Meta(description="Where a file that was never read before begins.")
    ] = "beginning"
    backlog_bytes_max: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="Of a file that is there at the first start, no more than so many bytes from its end are read."
        ),
    ] = None
    follow: Annotated[bool, Meta(description="False: end at the end of the files.")] = True
    encoding: Annotated[str, Meta(description="Of the files; what does not decode becomes U+FFFD.")] = "utf-8"
    poll_interval_s: Annotated[float, Meta(gt=0, description="Time between two looks at the files.")] = 0.25
    files_max: Annotated[int, Meta(ge=1, description="Files followed at a time.")] = 256
    rotate_wait_s: Annotated[
        float, Meta(ge=0, description="A file that was renamed or removed is read so long after it stopped growing.")
    ] = 5.0


class HostConfig(SourceSection, frozen=True, kw_only=True, tag="host"):
    """This host's CPU, memory, disks, network and temperatures; one record per group and sample."""

    stream: Annotated[str, Meta(min_length=1, description="Stream of its records.")] = "host"
    interval_s: Annotated[float, Meta(gt=0, description="Time between two samples.")] = 5.0
    groups: Annotated[
        tuple[Literal["cpu", "memory", "disk", "network", "temperature"], ...], Meta(description="What to sample.")
    ] = ("cpu", "memory", "disk", "network", "temperature")
    disks: Annotated[tuple[str, ...], Meta(description="Mount points whose usage is sampled.")] = ("/",)


class StdinConfig(SourceSection, frozen=True, kw_only=True, tag="stdin"):
    """Lines from standard input; ends with it."""

    stream: Annotated[str, Meta(min_length=1, description="Stream of its records.")] = "stdin"
    format: Annotated[
        Literal["lines", "json"],
        Meta(
            description="json: each line is an object with text, metrics, labels, event_time_us, payload (base64), "
            "content_type (all optional)."
        ),
    ] = "lines"


class GeneratorConfig(SourceSection, frozen=True, kw_only=True, tag="generator"):
    """Made-up records, for load and tests; the same seed makes the same records."""

    stream: Annotated[str, Meta(min_length=1, description="Stream of its records.")] = "generator"
    rate_per_s: Annotated[float, Meta(gt=0, description="Records a second.")] = 100.0
    text_bytes: Annotated[int, Meta(ge=0, le=65536, description="Size of a record's text.")] = 120
    count: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="Ends after so many; None: never.")] = None
    seed: Annotated[int, Meta(description="Of the texts.")] = 1


SourceConfig = TailConfig | HostConfig | StdinConfig | GeneratorConfig


class AgentConfig(Section, frozen=True, kw_only=True):
    """The whole file."""

    device_id: Annotated[str, Meta(min_length=1, description="Name of this device; unique in its site.")]
    site: Annotated[str, Meta(min_length=1, description="Name of its site.")]
    mqtt: MqttConfig = MqttConfig()
    spool: SpoolConfig = SpoolConfig()
    batch: BatchConfig = BatchConfig()
    limits: Limits = Limits()
    uplink: UplinkConfig = UplinkConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    sources: Annotated[tuple[SourceConfig, ...], Meta(description="Where records come from.")] = ()
    drain_deadline_s: Annotated[float, Meta(gt=0, description="For settling what is left, at the end.")] = 10.0


def validate(config: AgentConfig) -> AgentConfig:
    """Checks what one key alone does not show.

    Raises:
        ConfigError: naming the keys.
    """
    try:
        validate_name("device", config.device_id)
        validate_name("site", config.site)
        for source in config.sources:
            validate_name("stream", source.stream)
    except Permanent as error:
        raise ConfigError(str(error)) from error
    batch = config.batch
    if batch.bytes_target > batch.bytes_max:
        raise ConfigError(f"batch.bytes_target = {batch.bytes_target} is above batch.bytes_max = {batch.bytes_max}")
    if batch.bytes_max > frame_bytes_max(config.limits):
        raise ConfigError(
            f"batch.bytes_max = {batch.bytes_max} does not fit limits.envelope_bytes_max = "
            f"{config.limits.envelope_bytes_max}"
        )
    if batch.records_max > config.limits.records_per_batch_max:
        raise ConfigError(
            f"batch.records_max = {batch.records_max} is above limits.records_per_batch_max = "
            f"{config.limits.records_per_batch_max}"
        )
    if config.spool.bytes_max < 2 * config.limits.envelope_bytes_max:
        raise ConfigError(f"spool.bytes_max = {config.spool.bytes_max} holds less than two envelopes")
    names = [source.identity for source in config.sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are called {name!r}: give one of them another `name`")
    return config
