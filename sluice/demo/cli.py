"""`sluice demo`: the whole pipeline on this machine, on its own metrics and log files."""

import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import click

from sluice.errors import ConfigError

DEFAULT_DIR: Final = Path(".sluice/demo")
FEED_PORT: Final = 7443
# In a folder that a demo made: only such a one is emptied.
_MARKER: Final = ".sluice-demo"


@click.command()
@click.option("--seconds", type=click.FloatRange(min=1), help="How long records flow.  [until Ctrl-C]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@click.option("--tail", multiple=True, metavar="GLOB", help="Log files instead of those in /var/log; repeatable.")
@click.option(
    "--backlog-kib",
    default=96,
    show_default=True,
    type=click.IntRange(1),
    help="Read of what the log files hold already, shared among them; new lines come on top.",
)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help=f"Where to work; implies --keep.  [{DEFAULT_DIR}]"
)
@click.option("--keep", is_flag=True, help="Keep configurations, logs and lake of the run.")
@click.option("--live/--no-live", default=None, help="The live table.  [on a terminal]")
@click.option(
    "--drain-seconds", default=120.0, show_default=True, type=click.FloatRange(min=1), help="To catch up at the end."
)
@click.option("--seed", type=int, help="Of the sample stream.  [the clock]")
def demo(  # noqa: PLR0917 - click passes each option
    seconds: float | None,
    as_json: bool,
    tail: tuple[str, ...],
    backlog_kib: int,
    folder: Path | None,
    keep: bool,
    live: bool | None,
    drain_seconds: float,
    seed: int | None,
) -> None:
    """Runs brokers, gateway, central and an agent on this machine, and proves what they promise.

    Input is real: this host's metrics and log files, and a sample stream with made-up personal data that is declared
    as ordinary. At the end everything outside the site is searched for it, and the books are balanced.

    Exit status: 0 when every promise was kept, 1 when not, 130 when interrupted.
    """
    from sluice.demo.run import DemoRun, Interrupted, Options
    from sluice.demo.screen import Screen
    from sluice.demo.summary import text, what_next

    on_terminal = sys.stdout.isatty() if live is None else live
    kept = keep or folder is not None
    with stopping_on_signals() as stop, working_folder(folder, keep=kept) as work, feed_port() as port:
        options = Options(
            root=work.path,
            seconds=seconds,
            tail=tail,
            backlog_bytes=backlog_kib * 1024,
            drain_seconds=drain_seconds,
            feed_port=port,
            seed=time.time_ns() if seed is None else seed,
        )
        try:
            summary = DemoRun(options, stop, Screen(enabled=on_terminal and not as_json)).run()
        except Interrupted as error:
            _say(str(error))
            work.failed = False
            sys.exit(130)
        work.failed = bool(summary.problems)
    if as_json:
        click.echo(summary.to_json())
        for problem in summary.problems:
            _say(f"FAILED: {problem}")
    else:
        click.echo(text(summary))
        click.echo()
        click.echo(what_next(work.path, kept=work.stays))
    sys.exit(1 if summary.problems else 0)


def _say(line: str) -> None:
    click.echo(f"sluice demo: {line}", err=True)


@contextmanager
def feed_port() -> Iterator[int]:
    """The port that `sluice tail` looks at, when it is free; else 0, for any.

    Central binds it some seconds later; until then, and until the end, the UDP port of that number keeps other demos
    from choosing it too.
    """
    from sluice.demo.loopback import HOST, claim_port

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reservation:
        try:
            reservation.bind((HOST, FEED_PORT))
            port = claim_port(FEED_PORT, "feed")
        except (OSError, ConfigError):
            _say(f"port {FEED_PORT} is taken: the feed gets another one")
            port = 0
        yield port


@contextmanager
def stopping_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second signal aborts."""
    stop, abort = threading.Event(), threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            abort.set()
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        # Libraries make errors of their own of the interrupt (DuckDB does).
        if not abort.is_set():
            raise
        _say("aborted; all parts were killed")
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class WorkingFolder:
    """Where a run works. `failed` runs are kept, to be looked at."""

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        self.failed = True
        self._keep = keep

    @property
    def stays(self) -> bool:
        """Whether it is still there after the run: one that failed before it wrote anything is not."""
        return self._keep or (self.failed and any(self.path.iterdir()))


@contextmanager
def working_folder(folder: Path | None, *, keep: bool) -> Iterator[WorkingFolder]:
    """A fresh folder: a temporary one, unless it is to be kept.

    Raises:
        ConfigError: the folder holds something that no demo put there.
    """
    path = fresh_folder((folder or DEFAULT_DIR).absolute()) if keep else Path(tempfile.mkdtemp(prefix="sluice-demo-"))
    work = WorkingFolder(path, keep=keep)
    try:
        yield work
    finally:
        if not work.stays:
            shutil.rmtree(path, ignore_errors=True)
        elif work.failed and any(path.iterdir()):
            _say(f"look into {path}: logs are in {path / 'logs'}")


def fresh_folder(path: Path) -> Path:
    """Makes the folder, or empties it when a demo made it.

    Raises:
        ConfigError: it is not empty and not a demo's.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / _MARKER).is_file():
            raise ConfigError(f"--dir {path}: is not empty, and no demo made it; give another folder")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / _MARKER).touch()
    return path
