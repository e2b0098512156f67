"""The gateway's configuration file, section by section. Imports no heavy library."""

from typing import Annotated

from msgspec import Meta

from engine.config import EngineConfig
from gateway.local_config import LocalConfig
from gateway.path_config import BridgeConfig, InboxConfig, QuarantineConfig, RoutingConfig, StatusConfig
from gateway.policy import PolicyConfig
from gateway.scanner import ScannerConfig
from sluice.codec import Limits
from sluice.config import Section
from sluice.connections import KafkaConfig, MqttConfig, TelemetryConfig
from sluice.errors import ConfigError, Permanent
from sluice.kafka_client import TopicsConfig
from sluice.record import validate_name


class GatewayConfig(Section, frozen=True, kw_only=True):
    """Everything that a gateway is told."""

    site: Annotated[str, Meta(min_length=1, description="Name of the site: envelopes of others are refused.")]
    mqtt: MqttConfig = MqttConfig()
    kafka: KafkaConfig = KafkaConfig()
    topics: TopicsConfig = TopicsConfig()
    inbox: InboxConfig = InboxConfig()
    limits: Limits = Limits()
    status: StatusConfig = StatusConfig()
    routing: RoutingConfig = RoutingConfig()
    policy: PolicyConfig = PolicyConfig()
    scanner: ScannerConfig = ScannerConfig()
    local: LocalConfig = LocalConfig()
    engine: EngineConfig = EngineConfig()
    bridge: BridgeConfig = BridgeConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    drain_deadline_s: Annotated[float, Meta(gt=0, description="Time to settle what is under way at the end.")] = 20.0

    def __post_init__(self) -> None:
        """Checks what concerns several sections.

        Raises:
            ConfigError: naming the keys.
        """
        try:
            validate_name("site", self.site)
        except Permanent as error:
            raise ConfigError(str(error)) from error
        if self.inbox.packet_bytes_max <= self.limits.envelope_bytes_max:
            raise ConfigError(
                f"inbox.packet_bytes_max = {self.inbox.packet_bytes_max} must be larger than limits.envelope_bytes_max "
                f"= {self.limits.envelope_bytes_max}: else the broker drops an oversize envelope without a word"
            )
        if self.topics.message_bytes_max < self.limits.envelope_bytes_max:
            raise ConfigError(
                f"topics.message_bytes_max = {self.topics.message_bytes_max} must not be smaller than "
                f"limits.envelope_bytes_max = {self.limits.envelope_bytes_max}: Kafka would refuse what we accept"
            )
