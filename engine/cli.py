"""`sluice engine`: what the engine would choose here, and how fast it is."""

import json
from pathlib import Path

import click


@click.group()
def engine() -> None:
    """The inference engine: plan and benchmark."""


def _options(command: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(
        (
            click.option("--model", default=None, help="Package, folder or hub id; default: the packaged MiniLM."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option(
                "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True
            ),
            click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: all allowed."),
        )
    ):
        command = option(command)
    return command


@engine.command()
@_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan(model: str | None, device: str, precision: str, threads: int, as_json: bool) -> None:
    """Loads the model, measures, and shows what was chosen and why."""
    from engine.bench import plan as make_plan
    from engine.bench import section

    reasons = make_plan(section(model, device, precision, threads))
    if as_json:
        click.echo(json.dumps(reasons, indent=2))
        return
    for name, reason in reasons.items():
        click.echo(f"{name:13} {reason}")


@engine.command()
@_options
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A file with one text a line.",
)
@click.option("--limit", type=click.IntRange(1), default=20_000, show_default=True, help="Texts read from the file.")
@click.option("--seconds", type=click.FloatRange(1, 600), default=10.0, show_default=True, help="For the latencies.")
@click.option("--load", type=click.FloatRange(0.05, 0.95), default=0.5, show_default=True, help="Share of capacity.")
@click.option("--caches", is_flag=True, help="With the token and result caches.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def bench(  # noqa: PLR0917 - click passes each option
    model: str | None,
    device: str,
    precision: str,
    threads: int,
    texts: Path,
    limit: int,
    seconds: float,
    load: float,
    caches: bool,
    as_json: bool,
) -> None:
    """Measures throughput with a full queue, then latency of single online texts at a share of that."""
    from engine.bench import read_texts, run, section

    config = section(model, device, precision, threads, caches=caches)
    result = run(config, read_texts(texts, limit), seconds, load)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:18} {value:,.3f}" if isinstance(value, float) else f"{name:18} {value}")
