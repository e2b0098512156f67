"""The command finds its parts, and what is missing is one line that says what to install."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice import __version__, cli
from sluice.errors import MissingExtra


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four installed parts: one that works, one that fails, one that lacks an extra, one that is broken."""
    modules = {
        "part_good": "import click\n@click.command()\ndef command():\n    '''Works.'''\n    click.echo('done')\n",
        "part_bad": (
            "import click\nfrom sluice.errors import ConfigError, Retryable\n"
            "@click.command()\n@click.option('--config', is_flag=True)\ndef command(config):\n"
            "    '''Fails.'''\n    raise ConfigError('no such file') if config else Retryable('broker away')\n"
        ),
        "part_lacking": "import hyperscan_is_not_here\n",
        "part_late": (
            "import click\n@click.command()\ndef command():\n    '''Late.'''\n    import deltalake_is_not_here\n"
        ),
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "EXTRA_OF", {"hyperscan_is_not_here": "gateway", "deltalake_is_not_here": "central"})
    entries = [EntryPoint(name.removeprefix("part_"), f"{name}:command", cli.GROUP) for name in modules]

    class Installed(list[EntryPoint]):
        @property
        def names(self) -> set[str]:
            return {entry.name for entry in self}

    def entry_points(*, group: str, name: str | None = None) -> Installed:
        assert group == cli.GROUP
        return Installed(entry for entry in entries if name in {None, entry.name})

    monkeypatch.setattr(cli, "entry_points", entry_points)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of `sluice ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["sluice", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    streams = capsys.readouterr()
    return int(ended.value.code or 0), streams.out, streams.err


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["good"], 0, "done"),
        (["bad"], 1, "sluice: broker away"),
        (["bad", "--config"], 2, "sluice: no such file"),
        (["lacking"], 2, "pip install 'sluice-stream[gateway]'"),
        (["lacking", "--config", "x.toml", "more"], 2, "(module 'hyperscan_is_not_here' is not installed)"),
        (["late"], 2, "pip install 'sluice-stream[central]'"),
        (["godo"], 2, "No such command 'godo'"),
        (["good", "--bad-flag"], 2, "No such option"),
        (["--version"], 0, __version__),
    ],
)
def test_exit_status_and_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, said in out + err, "Traceback" in err) == (status, True, False), out + err


@pytest.mark.usefixtures("parts")
def test_help_lists_every_part_even_those_that_lack_an_extra() -> None:
    result = CliRunner().invoke(cli.sluice, ["--help"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.split("Commands:\n")[1].splitlines()] == [
        "bad",
        "good",
        "lacking",
        "late",
    ]
    assert "needs the extra 'gateway'" in " ".join(result.output.split())


def test_a_missing_module_of_our_own_is_a_bug_and_not_a_missing_extra() -> None:
    assert cli.translate_missing_module(ModuleNotFoundError(name="sluice.nothing")) is None
    assert cli.translate_missing_module(ModuleNotFoundError("no name")) is None
    found = cli.translate_missing_module(ModuleNotFoundError(name="grpc.aio"))
    assert isinstance(found, MissingExtra)
    assert found.extra == "client"
    asked = cli.translate_missing_module(ModuleNotFoundError(name="pyarrow"), "gateway")
    assert asked is not None
    assert asked.extra == "gateway"


def test_every_extra_that_a_message_names_is_declared() -> None:
    import tomllib

    root = Path(__file__).resolve().parent.parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(cli.EXTRA_OF.values()) <= set(project["optional-dependencies"])


def test_the_command_loads_nothing_heavy(python: Callable[[str], str]) -> None:
    loaded = json.loads(python("import json, sys, sluice.cli; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"torch", "transformers", "numpy", "pyarrow", "confluent_kafka", "grpc", "deltalake", "duckdb", "hyperscan"}
    assert not heavy & set(loaded)


def test_the_console_script_ends_with_the_status_and_with_all_that_was_printed() -> None:
    for arguments, status in ((["--version"], 0), (["scna"], 2)):
        done = subprocess.run([sys.executable, "-m", "sluice", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert done.stdout or done.stderr
