"""The rules of the house, as tests: who may call whom, what stays small, what stays quick."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "sluice", "edge", "engine", "gateway", "central")
LINES_MAX = 400
FUNCTION_LINES_MAX = 60

# Files that may be longer, and why.
LONG_FILES: dict[str, str] = {}
# Files that may wait by the clock, and why.
SLEEPERS = {
    "tests/central/test_intake.py": "a kill falls at a random moment, and records flow at a pace",
    "tests/edge/test_process.py": "a kill falls at a random moment",
    "tests/brokers/proxy.py": "delays are the faults that it injects",
    "tests/central/test_feed_subscribe.py": "Kafka's clock has milliseconds, and two entries must not share one",
}
# What `import edge` must not load: the agent has 60 MB.
HEAVY = ("torch", "transformers", "numpy", "pyarrow", "confluent_kafka", "grpc", "deltalake", "duckdb", "hyperscan")


def sources(*folders: str) -> list[Path]:
    found = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in found if "_pb2" not in file.name)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nobody_imports_what_the_contracts_forbid() -> None:
    assert "0 broken" in run(str(Path(sys.executable).with_name("lint-imports")), "--no-logo")


def test_every_package_of_the_house_is_under_contract_types_and_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert set(project["importlinter"]["root_packages"]) == set(PACKAGES)
    assert set(project["mypy"]["packages"]) == set(PACKAGES)
    assert {each.rstrip("*") for each in project["setuptools"]["packages"]["find"]["include"]} == set(PACKAGES)
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


@pytest.mark.parametrize("module", ["edge", "edge.cli", "edge.config", "sluice.cli", "gateway.cli", "central.cli"])
def test_importing_it_is_light(module: str) -> None:
    program = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run(sys.executable, "-c", program)))
    assert not loaded & set(HEAVY)


def test_running_an_agent_loads_nothing_heavy_either() -> None:
    """What `sluice edge` imports when it starts, and not only its command line."""
    program = "import json, sys, edge.agent; print(json.dumps(list(sys.modules)))"
    assert not set(json.loads(run(sys.executable, "-c", program))) & set(HEAVY)


def test_every_command_that_is_declared_loads() -> None:
    import click

    declared = entry_points(group="sluice.commands")
    assert {"edge", "gateway", "central", "demo", "doctor", "tail", "ledger"} <= set(declared.names)
    for entry in declared:
        assert isinstance(entry.load(), click.Command), entry.name


@pytest.mark.parametrize("file", sources(*PACKAGES, "tests", "benchmarks"), ids=name)
def test_files_and_functions_ask_for_a_second_look_in_time(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES_MAX or name(file) in LONG_FILES, f"{text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


def sleeps(tree: ast.AST, polling: bool = False) -> Iterator[int]:
    """Lines that wait by the clock, outside of loops that look again and again until a deadline."""
    for node in ast.iter_child_nodes(tree):
        inside = polling or isinstance(node, ast.While)
        if isinstance(node, ast.Call) and not inside:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            moment = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
            if called == "sleep" and not moment:
                yield node.lineno
        yield from sleeps(node, inside)


def test_no_test_waits_by_the_clock() -> None:
    found = [
        f"{name(file)}:{line}"
        for file in sources("tests")
        if name(file) not in SLEEPERS
        for line in sleeps(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, f"wait for an event with a deadline instead: {found}"


@pytest.mark.parametrize("listed", [LONG_FILES, SLEEPERS], ids=["long files", "sleepers"])
def test_no_exception_outlives_its_file(listed: dict[str, str]) -> None:
    assert all((ROOT / file).exists() and reason for file, reason in listed.items())


def test_no_folder_is_a_drawer_for_everything() -> None:
    assert not [
        name(file) for file in sources(*PACKAGES) if file.stem in {"utils", "util", "common", "helpers", "misc"}
    ]


def test_every_module_says_what_it_is_for() -> None:
    silent = [name(file) for file in sources(*PACKAGES) if file.stat().st_size and not _docstring(file)]
    assert not silent


def _docstring(file: Path) -> str | None:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_the_make_targets_that_the_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"help", "demo", "test", "test-integration", "lint", "bench", "sim", "protos"} <= targets
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "pyproject.toml", ROOT / ".ci/run"]:
        named = set(re.findall(r"(?<![\w.])make (?:--[a-z-]+ )*([a-z]+(?:-[a-z]+)*)\b", _commands(document)))
        assert named <= targets, name(document)


def _commands(document: Path) -> str:
    """The parts of a document that are commands: `code` and indented or fenced blocks."""
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".md":
        return "\n".join(line for line in text.splitlines() if "make --no-print-directory" in line)
    return "\n".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL))


def test_help_names_every_target() -> None:
    said = run("make", "help")
    for target in ("demo", "test", "test-integration", "lint", "bench", "sim", "protos"):
        assert re.search(rf"make {target} +\S", said), target


def test_the_version_is_said_once() -> None:
    from sluice import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_executables_are_executable_and_shell_scripts_parse() -> None:
    for script in (ROOT / ".ci/run", ROOT / "deploy/ci/install-brokers", ROOT / "deploy/kafka/fetch.sh"):
        assert script.stat().st_mode & 0o111, name(script)
        shell = script.read_text(encoding="utf-8").splitlines()[0].removeprefix("#!")
        run(shell, "-n", str(script))
