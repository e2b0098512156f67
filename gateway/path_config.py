"""Configuration of the record's path: inbox, routing, bridge, status and quarantine."""

from typing import Annotated

from msgspec import Meta

from sluice.config import Section

MIB = 1024 * 1024


class InboxConfig(Section, frozen=True, kw_only=True):
    """Limits of what the gateway holds, remembers and acknowledges."""

    client_id: Annotated[
        str, Meta(description="MQTT client id; the broker's session belongs to it. Empty: sluice-gateway-SITE.")
    ] = ""
    window_messages_max: Annotated[
        int, Meta(ge=1, le=65535, description="Envelopes worked on at once; also MQTT's ReceiveMaximum.")
    ] = 64
    held_messages_max: Annotated[
        int, Meta(ge=1, description="Envelopes in hand, for brokers that send more than ReceiveMaximum.")
    ] = 4096
    held_bytes_max: Annotated[int, Meta(ge=1 << 16, description="Their size, as received.")] = 64 * MIB
    decoded_bytes_max: Annotated[int, Meta(ge=1 << 16, description="Their records' size, decompressed.")] = 128 * MIB
    packet_bytes_max: Annotated[
        int,
        Meta(
            ge=1024,
            description="Largest MQTT packet that the broker may send us. Above limits.envelope_bytes_max, so that an "
            "oversize envelope is quarantined instead of silently dropped by the broker.",
        ),
    ] = 4 * MIB
    ack_delay_ms: Annotated[
        float, Meta(ge=0, le=1000, description="How long settled ranges are collected into one acknowledgement.")
    ] = 10.0
    spools_max: Annotated[int, Meta(ge=1, description="Spools whose settled positions are remembered.")] = 10_000
    runs_per_spool_max: Annotated[int, Meta(ge=1, description="Runs of settled positions remembered per spool.")] = 256
    envelopes_max: Annotated[
        int, Meta(ge=1, description="Envelopes whose checksum is remembered, to notice a cloned device.")
    ] = 50_000


class RoutingConfig(Section, frozen=True, kw_only=True):
    """How envelopes are classified."""

    threads: Annotated[int, Meta(ge=1, le=256, description="Envelopes classified at once.")] = 2
    timeout_s: Annotated[
        float, Meta(gt=0, description="Time for one envelope; one that takes longer stays on the site.")
    ] = 10.0


class BridgeConfig(Section, frozen=True, kw_only=True):
    """How envelopes are written to Kafka."""

    queue_bytes_max: Annotated[int, Meta(ge=MIB, description="Unacknowledged bytes in the producer.")] = 64 * MIB
    delivery_timeout_s: Annotated[
        float, Meta(gt=0, description="After this an unacknowledged envelope is handed to the producer again.")
    ] = 30.0
    zstd_level: Annotated[int, Meta(ge=1, le=19, description="Compression of what is exported.")] = 1


class StatusConfig(Section, frozen=True, kw_only=True):
    """Limits of status messages."""

    bytes_max: Annotated[int, Meta(ge=64, description="Size of a status message.")] = 32 * 1024
    ranges_max: Annotated[int, Meta(ge=1, description="Runs of waiting positions in it.")] = 1024
    devices_max: Annotated[int, Meta(ge=1, description="Devices whose status waits for Kafka.")] = 10_000


class QuarantineConfig(Section, frozen=True, kw_only=True):
    """Where what cannot be processed is kept, on the site."""

    directory: Annotated[str, Meta(min_length=1, description="Directory of the originals (0700).")] = "quarantine"
    bytes_max: Annotated[int, Meta(ge=0, description="Size of all originals together.")] = 1024 * MIB
    files_max: Annotated[int, Meta(ge=0, description="Number of originals.")] = 10_000
    remembered_max: Annotated[
        int, Meta(ge=1, description="Envelopes remembered, so that a resend is not announced again.")
    ] = 10_000
