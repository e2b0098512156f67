"""`sluice gateway`: runs a site's gateway."""

import asyncio
from pathlib import Path

import click

from gateway.config import GatewayConfig
from sluice.config import load


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="SLUICE_CONFIG",
    help="TOML file; SLUICE_... variables override it.",
)
@click.option("--check", is_flag=True, help="Check configuration, policy and models, and exit.")
def gateway(config_file: Path | None, check: bool) -> None:
    """MQTT to Kafka, for one site: what is sensitive stays here, sealed, and is analysed here.

    Ends in order on SIGTERM or Ctrl-C: what is under way is settled; what is not stays with its device. On
    SIGHUP the engine's section is read again, and models that changed are replaced without a pause.
    """
    config = load(GatewayConfig, config_file)
    if check:
        click.echo(checked(config))
        return
    from gateway.app import run

    asyncio.run(run(config, read_again=lambda: load(GatewayConfig, config_file)))


def checked(config: GatewayConfig) -> str:
    """Reads the policy, compiles its detectors, looks at the models, and says in a few lines what would run.

    Raises:
        ConfigError: naming file and key.
        Permanent: a model is not there, or damaged.
    """
    from engine.check import check_models
    from gateway.classifier import build
    from gateway.policy import configured
    from sluice.kafka_client import WRITER_PROMISES, user_options

    policy = configured(config.policy)
    build(policy, config.scanner)
    user_options(config.kafka, WRITER_PROMISES)
    analysis = config.local.analysis
    models = check_models(config.engine, analysis.task, key="local.analysis.task") if analysis.enabled else []
    rules = f"{len(policy.rules)} rules from {config.policy.file}" if policy else "the built-in policy"
    return "\n".join(
        (
            "ok",
            f"  site {config.site}: MQTT at {config.mqtt.host}:{config.mqtt.port}",
            f"  policy: {rules}",
            f"  stays here: {config.local.directory} (sealed), {config.quarantine.directory} (quarantine)",
            f"  leaves: {config.kafka.records_topic} at Kafka {config.kafka.bootstrap_servers}",
            *(f"  {line}" for line in models),
        )
    )
