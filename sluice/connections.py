"""Configuration of the connections that several parts share: MQTT, Kafka, telemetry."""

from typing import Annotated, Literal

from msgspec import Meta, field

from sluice.config import Section


class MqttConfig(Section, frozen=True, kw_only=True):
    """How to reach the MQTT 5 broker."""

    host: Annotated[str, Meta(description="Broker's host name or address.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="Broker's port.")] = 1883
    username: Annotated[str | None, Meta(description="User name; None for none.")] = None
    password_file: Annotated[str | None, Meta(description="File that holds the password.")] = None
    ca_file: Annotated[str | None, Meta(description="CA certificate (PEM); switches TLS on.")] = None
    certificate_file: Annotated[str | None, Meta(description="Client certificate (PEM) for mTLS.")] = None
    key_file: Annotated[str | None, Meta(description="Client key (PEM) for mTLS.")] = None
    keepalive_s: Annotated[int, Meta(ge=1, description="Silence after which a ping is sent.")] = 15
    session_expiry_s: Annotated[int, Meta(ge=0, description="How long the broker keeps our session.")] = 3600
    connect_timeout_s: Annotated[float, Meta(gt=0, description="Limit for one connection attempt.")] = 5.0
    reconnect_delay_s_max: Annotated[float, Meta(gt=0, description="Longest back-off (full jitter).")] = 30.0

    def __post_init__(self) -> None:
        """Refuses settings that would silently mean less security than they seem to.

        Raises:
            ValueError: naming the keys; the configuration's reader makes a ConfigError of it.
        """
        if (self.certificate_file or self.key_file) and not self.ca_file:
            raise ValueError("certificate_file and key_file have no effect without ca_file, which switches TLS on")
        if self.key_file and not self.certificate_file:
            raise ValueError("key_file has no effect without certificate_file")
        if self.password_file and self.username is None:
            raise ValueError("password_file has no effect without username")


class KafkaConfig(Section, frozen=True, kw_only=True):
    """How to reach Kafka, and its topics."""

    bootstrap_servers: Annotated[str, Meta(min_length=1, description="host:port[,host:port...]")] = "127.0.0.1:9092"
    records_topic: Annotated[str, Meta(min_length=1, description="Topic of envelopes.")] = "sluice.records"
    results_topic: Annotated[str, Meta(min_length=1, description="Topic of results.")] = "sluice.results"
    quarantine_topic: Annotated[str, Meta(min_length=1, description="Topic of quarantine.")] = "sluice.quarantine"
    status_topic: Annotated[str, Meta(min_length=1, description="Topic of device status.")] = "sluice.status"
    options: Annotated[
        dict[str, str], Meta(description="Further librdkafka settings, such as security.protocol and sasl.*.")
    ] = field(default_factory=dict)


class TelemetryConfig(Section, frozen=True, kw_only=True):
    """Logs, metrics and probes."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Least severe log line written.")
    ] = "info"
    host: Annotated[str, Meta(description="Address of /metrics, /healthz and /readyz.")] = "127.0.0.1"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None, Meta(description="Their port; None: off; 0: any free one.")
    ] = None
    connections_max: Annotated[int, Meta(ge=1, description="Connections to them at once; more are hung up on.")] = 16
    series_max: Annotated[
        int,
        Meta(ge=1, description='Series of one counter; label values beyond it share the series "(other)".'),
    ] = 1000
