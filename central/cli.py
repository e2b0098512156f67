"""`sluice central`: runs the cloud side, or some of its roles."""

import asyncio
from pathlib import Path
from typing import Any

import click

from central.config import ROLES, CentralConfig
from sluice.config import load


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="SLUICE_CONFIG",
    help="TOML file; SLUICE_... variables override it.",
)
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(ROLES), help="Only this role; may be repeated.  [all]"
)
@click.option("--check", is_flag=True, help="Check configuration and models, say what would run, and exit.")
def central(config_file: Path | None, roles: tuple[str, ...], check: bool) -> None:
    """Kafka into the lake, through the engine, and out to clients over gRPC.

    Ends in order on SIGTERM or Ctrl-C: what is in flight is finished and every client gets a token to resume with.
    On SIGHUP the engine's section is read again, and models that changed are replaced without a pause.
    """
    overrides: dict[str, Any] = {"roles": list(roles)} if roles else {}
    config = load(CentralConfig, config_file, overrides=overrides)
    if check:
        check_files(config)
        click.echo("\n".join((summary(config), *check_engine(config))))
        return
    from central.app import run

    asyncio.run(run(config, read_again=lambda: load(CentralConfig, config_file, overrides=overrides)))


def check_files(config: CentralConfig) -> None:
    """Reads the files that the configuration names.

    Raises:
        ConfigError: naming the key and the file.
    """
    from central.token_key import read_key
    from sluice.config import read_secret

    if "feed" not in config.roles:
        return
    feed = config.feed
    read_secret(feed.certificate_file, "feed.certificate_file")
    read_secret(feed.key_file, "feed.key_file")
    read_secret(feed.ca_file, "feed.ca_file")
    if feed.token_key_file is not None:
        read_key(Path(feed.token_key_file))


def check_engine(config: CentralConfig) -> list[str]:
    """A line for each model that the roles need, without loading it.

    Raises:
        ConfigError: one does not offer what it is configured for.
        Permanent: one is not there, or damaged.
    """
    from engine.check import check_models

    analysis = "analysis" in config.roles
    if not analysis and not ("feed" in config.roles and config.feed.analyze):
        return []
    task, model = (config.analysis.task, config.analysis.model) if analysis else ("", "")
    return [f"  {line}" for line in check_models(config.engine, task, model, "analysis.task")]


def summary(config: CentralConfig) -> str:
    """What would run, a line per role."""
    kafka = config.kafka
    lines = [f"configuration is valid; Kafka at {kafka.bootstrap_servers}"]
    if "lake" in config.roles:
        lines.append(f"  lake: {kafka.records_topic} into {config.lake.uri}")
    if "analysis" in config.roles:
        lines.append(f"  analysis: {kafka.records_topic} through {config.engine.model} into {kafka.results_topic}")
    if "feed" in config.roles:
        secure = "without TLS" if config.feed.certificate_file is None else "with TLS"
        lines.append(f"  feed: gRPC on {config.feed.host}:{config.feed.port}, {secure}")
    return "\n".join(lines)
