"""A virtual environment for each peer, made when it is first needed from `peers/NAME.txt`, and kept.

Peers ask for versions that exclude each other (and ours), so each lives alone. Nothing but pip and PyPI is used.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.engine.process import Unavailable
from benchmarks.engine.rounds import say

REQUIREMENTS = Path(__file__).with_name("peers")
EXPORTER = Path(__file__).with_name("export_onnx.py")
INSTALL_S_MAX = 1800


def python_of(peer: str, folder: Path, *, install: bool) -> Path:
    """The interpreter of a peer's environment.

    Raises:
        Unavailable: it is not there and may not be made, or pip failed.
    """
    wanted = REQUIREMENTS / f"{peer}.txt"
    place = folder / peer
    python = place / "bin" / "python"
    stamp = place / ".installed"
    digest = hashlib.blake2b(wanted.read_bytes(), digest_size=16).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    if not install:
        raise Unavailable("its environment is not there (--no-install)")
    say(f"peers: installing {peer} into {place} (once; torch is large)\n")
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(place)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)])
    stamp.write_text(digest)
    return python


def lay_out_hub(folder: Path, model: Path) -> Path:
    """A Hugging Face cache with the model under the id `local/model`, for peers that load by id only."""
    repository = folder / "hub" / "models--local--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("main0")
    (repository / "snapshots").mkdir(exist_ok=True)
    link = repository / "snapshots" / "main0"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(model, target_is_directory=True)
    return folder


def export_onnx(python: Path, model: Path, folder: Path) -> Path:
    """The model as ONNX, beside its own files; made once, in the peer's environment."""
    if not (folder / "model.onnx").exists():
        say("peers: exporting the model to ONNX (once)\n")
        folder.mkdir(parents=True, exist_ok=True)
        _run([str(python), str(EXPORTER), str(model), str(folder)])
    return folder


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S_MAX, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]}: took more than {INSTALL_S_MAX} s") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Unavailable(f"{Path(command[1]).name}: {lines[-1][:300] if lines else 'failed'}")
