"""Each Dockerfile's install steps, run in a clean virtual environment: no container engine is needed for that."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("edge", "gateway", "central")


def extras(part: str) -> str:
    """What the Dockerfile installs the wheel with: `[gateway]`, or nothing for the agent."""
    text = (ROOT / "deploy" / f"{part}.Dockerfile").read_text()
    found = re.search(r'pip install --no-cache-dir "\$\(ls /wheels/sluice_stream-\*\.whl\)(\[\w+\])?"', text)
    assert found, f"deploy/{part}.Dockerfile does not install the wheel"
    return found.group(1) or ""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what the Dockerfile copies and nothing else."""
    source = tmp_path_factory.mktemp("src")
    text = (ROOT / "deploy" / "edge.Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE):
        *names, _target = line.split()
        for name in names:
            run("cp", "-r", str(ROOT / name), str(source / name), cwd=source)
    out = tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("sluice_stream-*.whl")
    return built


@pytest.fixture
def venv(tmp_path: Path) -> Iterator[Path]:
    """An empty virtual environment, removed afterwards: with torch it takes 5 GB, and pytest keeps its folders."""
    path = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(path), cwd=tmp_path)
    yield path
    shutil.rmtree(path)


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_install_steps_give_a_working_command(part: str, wheel: Path, venv: Path, tmp_path: Path) -> None:
    # Without bytecode, which for torch takes longer than copying it.
    run(str(venv / "bin" / "pip"), "install", "-q", "--no-compile", f"{wheel}{extras(part)}", cwd=tmp_path)
    command = str(venv / "bin" / "sluice")
    config = tmp_path / f"{part}.toml"
    text = (ROOT / "deploy" / "config" / f"{part}.toml").read_text()
    state = tmp_path / "state"
    policy = str(ROOT / "deploy" / "config" / "policy.toml")
    config.write_text(text.replace("/var/lib/sluice", str(state)).replace("/etc/sluice/policy.toml", policy))
    run(command, part, "--config", str(config), "--check", cwd=tmp_path)
    assert part in run(command, "--help", cwd=tmp_path)
