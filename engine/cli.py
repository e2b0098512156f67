"""`sluice engine`: what the engine would choose here, and how fast it is."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

if TYPE_CHECKING:
    from engine.config import EngineConfig


@click.group()
def engine() -> None:
    """The inference engine: plan and benchmark."""


def _configured(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that both commands have; the command gets those of the engine as one `config`."""

    @functools.wraps(command)
    def configured(settings: tuple[str, ...], **values: Any) -> None:
        from engine.bench import section

        config = section({key: values.pop(key) for key in ("model", "device", "precision", "threads")}, settings)
        command(config=config, **values)

    for option in reversed(
        (
            click.option("--model", default=None, help="Package, folder or hub id; default: the packaged MiniLM."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda (all GPUs) or cuda:N."),
            click.option(
                "--precision",
                type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
                default="auto",
                show_default=True,
                help="auto: half where it is measured faster and agrees with fp32.",
            ),
            click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: all allowed."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="KEY=VALUE",
                help="Any other key below engine. in the configuration, such as workers=2; may be repeated.",
            ),
            click.option("--json", "as_json", is_flag=True, help="One JSON object."),
        )
    ):
        configured = option(configured)
    return configured


@engine.command()
@_configured
def plan(config: "EngineConfig", as_json: bool) -> None:
    """Loads all models, measures, and shows what was chosen and why.

    Further models and one that generates text are given by --set, as in the configuration: models.ner.model=FOLDER,
    generation.model=FOLDER.
    """
    from engine.bench import plan as make_plan
    from engine.bench_report import plan_lines

    made = make_plan(config)
    if as_json:
        click.echo(json.dumps(made, indent=2))
        return
    for name, reason in plan_lines(made, shutil.get_terminal_size().columns):
        click.echo(f"{click.style(name, bold=True)}  {reason}".rstrip())


@engine.command()
@_configured
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A file with one text a line, in UTF-8; blank lines are passed over.",
)
@click.option("--task", default="", help="What to do with the texts; default: classify, or what else the model offers.")
@click.option("--limit", type=click.IntRange(1), default=20_000, show_default=True, help="Texts read from the file.")
@click.option(
    "--seconds",
    type=click.FloatRange(1, 600),
    default=10.0,
    show_default=True,
    help="How long latencies are measured, after the throughput.",
)
@click.option(
    "--load",
    type=click.FloatRange(0.05, 0.95),
    default=0.5,
    show_default=True,
    help="Share of the measured throughput at which single texts arrive while latencies are measured.",
)
@click.option(
    "--caches",
    is_flag=True,
    help="With the token and result caches. Without, too, identical texts under way are computed once.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also draw a picture into this file (.png, .svg, .pdf); needs matplotlib.",
)
def bench(
    config: "EngineConfig",
    *,
    texts: Path,
    task: str,
    limit: int,
    seconds: float,
    load: float,
    caches: bool,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Measures throughput with a full queue, then latency of single online texts at a share of that.

    texts_per_s counts all texts of the file, from the first to the last answer; tokens_per_s and padding_share what the
    device computed; device_busy_share how much of that time it worked. p50_ms and p99_ms are the latencies of single
    texts that arrive at random times, whether or not the ones before are answered; those that have no answer when as
    much time has passed again are counted in latency_unanswered.
    """
    from engine.bench import read_texts, run, without_caches
    from engine.bench_report import draw, report_lines, require_plotting

    if picture is not None:
        require_plotting(picture)
    with _Bar() as bar:
        wanted = config if caches else without_caches(config)
        measured = run(wanted, read_texts(texts, limit), seconds, load, bar.show, task)
    if as_json:
        click.echo(json.dumps(measured.figures))
    else:
        for line in report_lines(measured, shutil.get_terminal_size().columns):
            click.echo(line)
    if picture is not None:
        draw(measured, picture)
        click.echo(f"drawn: {picture}", err=True)


class _Bar:
    """A line on the terminal that says what is under way; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def show(self, what: str, share: float) -> None:
        """Shows it; `share` in [0, 1] is done."""
        done = round(30 * share)
        self._write(f"[{'#' * done}{'-' * (30 - done)}] {share:4.0%}  {what}")

    def _write(self, line: str) -> None:
        if self._on:
            click.echo(f"\r\x1b[K{line}", err=True, nl=False)
