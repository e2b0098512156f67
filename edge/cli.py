"""`sluice edge`: runs the agent."""

from pathlib import Path
from typing import Any

import click

from sluice.errors import ConfigError


@click.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--check", is_flag=True, help="Check the configuration and end.")
@click.option("--device", help="Name of this device (device_id).")
@click.option("--site", help="Name of its site.")
@click.option("--broker", help="mqtt://[user@]host[:port]; mqtts:// uses port 8883 and needs mqtt.ca_file.")
@click.option(
    "--source", "sources", multiple=True, help="tail:GLOB, host, stdin, stdin:json, generator:RATE[:COUNT]; repeatable."
)
@click.option("--stream", "streams", multiple=True, help="Stream of the source at the same position; repeatable.")
@click.option(
    "--sensitivity", type=click.Choice(["unspecified", "public", "internal", "sensitive"]), help="Of --source."
)
@click.option("--spool", "spool_directory", help="Directory of the spool.")
@click.option("--telemetry-port", type=int, help="Port of /metrics, /healthz and /readyz; 0: any free one.")
@click.option("--exit-when-drained", is_flag=True, help="End with 0 when the sources end and all is acknowledged.")
def edge(
    config_path: Path | None,
    check: bool,
    sources: tuple[str, ...],
    streams: tuple[str, ...],
    sensitivity: str | None,
    exit_when_drained: bool,
    **flags: Any,
) -> None:
    """Takes records from this device to its gateway, through a durable spool."""
    import asyncio

    from edge.agent import Agent
    from edge.config import AgentConfig, validate
    from sluice.config import load

    overrides = _overrides(**flags)
    if sources:
        overrides["sources"] = _sources(sources, streams, sensitivity, follow=not exit_when_drained)
    elif streams or sensitivity:
        raise ConfigError("--stream and --sensitivity describe a --source; give one, or use the file's [[sources]]")
    config = validate(load(AgentConfig, config_path, overrides=overrides))
    if exit_when_drained:
        _check_ends(config)
    if check:
        click.echo(f"ok: device {config.device_id} at site {config.site}, {len(config.sources)} sources")
        return
    asyncio.run(Agent(config).run(exit_when_drained=exit_when_drained))


def _overrides(
    device: str | None, site: str | None, broker: str | None, spool_directory: str | None, telemetry_port: int | None
) -> dict[str, Any]:
    from edge.urls import parse_broker

    overrides: dict[str, Any] = {}
    if device is not None:
        overrides["device_id"] = device
    if site is not None:
        overrides["site"] = site
    if broker is not None:
        overrides["mqtt"] = parse_broker(broker)
    if spool_directory is not None:
        overrides["spool"] = {"directory": spool_directory}
    if telemetry_port is not None:
        overrides["telemetry"] = {"port": telemetry_port}
    return overrides


def _sources(
    words: tuple[str, ...], streams: tuple[str, ...], sensitivity: str | None, *, follow: bool
) -> list[dict[str, Any]]:
    from edge.urls import parse_source

    if len(streams) > len(words):
        raise ConfigError(f"{len(streams)} --stream for {len(words)} --source")
    named = [*streams, *[None] * (len(words) - len(streams))]
    sections = [parse_source(word, stream, follow=follow) for word, stream in zip(words, named, strict=True)]
    return [section | ({"sensitivity": sensitivity} if sensitivity else {}) for section in sections]


def _check_ends(config: Any) -> None:
    """A source that never ends never drains."""
    from edge.config import GeneratorConfig, HostConfig, TailConfig

    for source in config.sources:
        endless = (
            isinstance(source, HostConfig)
            or (isinstance(source, GeneratorConfig) and source.count is None)
            or (isinstance(source, TailConfig) and source.follow)
        )
        if endless:
            raise ConfigError(
                f"--exit-when-drained: source {source.identity} never ends "
                "(tail: set follow = false; generator: set count)"
            )
