"""OpenVINO beside PyTorch: the same results, a kept conversion that is never trusted blindly, a reasoned choice."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import backends, models
from engine.backend import Backend, DeviceOutOfMemory
from engine.config import CacheConfig, EngineConfig
from engine.models import ModelCard
from sluice.errors import ConfigError, Permanent
from tests.engine.test_backend import rows, run

pytestmark = pytest.mark.skipif(not backends.installed(), reason="the extra is not installed")

EXACT, HALF = 0.9999, 0.999
LENGTHS = (5, 1, 17, 40, 8, 40)


def section(model: str | Path, **changes: Any) -> EngineConfig:
    tree = {"model": str(model), "device": "cpu", "precision": "fp32", "threads": 1, "backend": "openvino", **changes}
    return EngineConfig(**tree)


@pytest.fixture
def open_model(tiny_models: dict[str, Path]) -> Iterator[Callable[..., tuple[Backend, dict[str, str]]]]:
    """Opens tiny models; closes them afterwards."""
    opened: list[Backend] = []

    def start(model: str | ModelCard, **changes: Any) -> tuple[Backend, dict[str, str]]:
        card = model if isinstance(model, ModelCard) else models.read_card(model, tiny_models[model])
        reasons: dict[str, str] = {}
        opened.append(backends.open_backend(section(card.folder, **changes), card, reasons))
        return opened[-1], reasons

    yield start
    for each in opened:
        each.close()


def least_cosine(left: list[Any], right: list[Any]) -> float:
    pairs = [(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)) for a, b in zip(left, right, strict=True)]
    return min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize("name", ["bert", "bert-cls", "head", "distilbert", "roberta", "ner", "ner-bytes"])
def test_outputs_equal_pytorchs_for_every_kind_of_model(open_model: Any, converted: CacheConfig, name: str) -> None:
    theirs, _ = open_model(name, backend="torch")
    ours, _ = open_model(name, caches=converted)
    expected, got = run(theirs, rows(*LENGTHS)), run(ours, rows(*LENGTHS))
    assert [row.shape for row in got] == [row.shape for row in expected]
    assert [row.dtype for row in got] == [row.dtype for row in expected]
    width = theirs.info.embedding_width
    if width:
        assert least_cosine([row[:width] for row in got], [row[:width] for row in expected]) > EXACT
    if theirs.info.labels:  # logits are read through a softmax: their size matters, not only their direction
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one[..., width:], other[..., width:], atol=1e-3, rtol=1e-3)
    facts = ("device", "length_max", "embedding_width", "labels", "per_token", "precision")
    assert [getattr(ours.info, each) for each in facts] == [getattr(theirs.info, each) for each in facts]


@pytest.mark.parametrize(("precision", "least"), [("fp32", EXACT), ("bf16", HALF), ("fp16", HALF)])
def test_each_precision_stays_within_its_stated_tolerance(
    open_model: Any, converted: CacheConfig, minilm: ModelCard, precision: str, least: float
) -> None:
    theirs, _ = open_model(minilm, backend="torch")
    ours, reasons = open_model(minilm, caches=converted, precision=precision)
    assert ours.info.precision == precision
    assert reasons["precision"] == f"{precision}: configured"
    chance = np.random.default_rng(7)
    batch = [chance.integers(1000, 20_000, length).astype(np.int32) for length in (9, 3, 60, 1, 254, 33)]
    assert least_cosine(run(ours, batch), run(theirs, batch)) > least


def test_auto_precision_says_what_it_measured(open_model: Any, converted: CacheConfig) -> None:
    ours, reasons = open_model("bert", caches=converted, precision="auto")
    assert reasons["precision"].startswith(ours.info.precision + ": ")
    assert "measured" in reasons["precision"] or "no instructions" in reasons["precision"]


def test_a_kept_model_is_read_back_without_its_weights(
    open_model: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_models["head"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card, caches = models.read_card("head", folder), CacheConfig(directory=str(tmp_path / "caches"))
    first, said = open_model(card, caches=caches)
    assert "converted, and kept in" in said["network"]
    assert (tmp_path / "caches/openvino").stat().st_mode & 0o77 == 0
    expected = run(first, rows(*LENGTHS))
    (folder / "model.safetensors").unlink()
    again, said = open_model(card, caches=caches)
    assert "read from" in said["network"]
    assert all((a == b).all() for a, b in zip(run(again, rows(*LENGTHS)), expected, strict=True))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: flip(kept / "model.bin"),
        lambda kept: flip(kept / "model.xml"),
        lambda kept: (kept / "model.bin").write_bytes((kept / "model.bin").read_bytes()[:-1]),
        lambda kept: (kept / "model.xml").unlink(),
        lambda kept: (kept / "manifest.json").unlink(),
        lambda kept: (kept / "manifest.json").write_text("[]"),
        lambda kept: (kept / "manifest.json").write_bytes(b"\xff{"),
    ],
    ids=["weights", "graph", "short", "no graph", "no manifest", "other manifest", "garbage"],
)
def test_a_damaged_kept_model_is_converted_anew(
    open_model: Any, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    caches = CacheConfig(directory=str(tmp_path))
    first, _ = open_model("bert", caches=caches)
    expected = run(first, rows(*LENGTHS))
    (kept,) = (tmp_path / "openvino").iterdir()
    damage(kept)
    again, said = open_model("bert", caches=caches)
    assert "converted, and kept in" in said["network"]
    assert least_cosine(run(again, rows(*LENGTHS)), expected) > EXACT
    _, said = open_model("bert", caches=caches)
    assert "read from" in said["network"]


def test_a_directory_that_cannot_be_written_costs_the_next_start_only(open_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ours, said = open_model("bert", caches=CacheConfig(directory=str(tmp_path / "file")))
    assert "cannot be kept" in said["network"]
    assert len(run(ours, rows(3))) == 1


def test_old_conversions_do_not_pile_up(open_model: Any, tmp_path: Path) -> None:
    root = tmp_path / "openvino"
    for age, name in enumerate(("oldest", "older", "previous", ".new-cut-short")):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (1000 + age, 1000 + age))
    (root / ".new-under-way").mkdir()
    open_model("bert", caches=CacheConfig(directory=str(tmp_path)))
    left = {each.name for each in root.iterdir()}
    assert len(left) == 3
    assert {"previous", ".new-under-way"} < left


def test_lanes_share_one_model_and_compute_side_by_side(open_model: Any, converted: CacheConfig) -> None:
    whole, _ = open_model("bert", caches=converted, threads=2)
    batches = [rows(*range(1, count)) for count in (4, 9, 14, 19)]
    expected = [run(whole, batch) for batch in batches]
    allowed = sorted(os.sched_getaffinity(0))
    twins = [whole.twin(1, [allowed[0]]), whole.twin(1)]
    whole.close()
    got: dict[int, Any] = {}
    seats = {}

    def drive(lane: int) -> None:
        got[lane] = [[run(twins[lane], batch) for batch in batches] for _ in range(3)][-1]
        seats[lane] = sorted(os.sched_getaffinity(0))

    threads = [threading.Thread(target=drive, args=(lane,)) for lane in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for lane in range(2):
        assert all(least_cosine(a, b) > EXACT for a, b in zip(got[lane], expected, strict=True))
    assert seats == {0: [allowed[0]], 1: allowed}
    assert sorted(os.sched_getaffinity(0)) == allowed, "only the lane's own thread is pinned"
    twins[0].close()
    twins[1].empty_cache()
    assert least_cosine(run(twins[1], batches[0]), expected[0]) > EXACT
    twins[1].close()


def test_a_lane_that_comes_later_gets_a_stream_of_its_own(open_model: Any, converted: CacheConfig) -> None:
    first, _ = open_model("bert", caches=converted)
    expected = run(first, rows(*LENGTHS))
    later = first.twin()
    assert least_cosine(run(later, rows(*LENGTHS)), expected) > EXACT
    assert least_cosine(run(first, rows(*LENGTHS)), expected) > EXACT
    later.close()
    later.close()


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (MemoryError(), DeviceOutOfMemory),
        (RuntimeError("Exception from src:1\nstd::bad_alloc"), DeviceOutOfMemory),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, translated: type[Exception]) -> None:
    from engine.openvino_backend import translated_memory

    with pytest.raises(translated), translated_memory():
        raise error


def test_a_model_that_computes_something_else_is_refused(
    open_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.openvino_model.DIFFERENCE_MAX", -1.0)
    with pytest.raises(Permanent, match="differs from PyTorch"):
        open_model("bert")
    ours, reasons = open_model("bert", backend="auto", caches=CacheConfig(directory=str(tmp_path)))
    assert reasons["backend"].startswith("torch: OpenVINO was tried: model ")
    assert len(run(ours, rows(3))) == 1
    assert not (tmp_path / "openvino").exists(), "it is not kept either"


@pytest.mark.parametrize(("gain_min", "chosen"), [(0.0, "openvino"), (1e9, "torch")])
def test_auto_takes_the_faster_one_and_says_by_how_much(
    open_model: Any, converted: CacheConfig, monkeypatch: pytest.MonkeyPatch, gain_min: float, chosen: str
) -> None:
    monkeypatch.setattr("engine.backends.GAIN_MIN", gain_min)
    ours, reasons = open_model("bert", backend="auto", caches=converted)
    assert reasons["backend"].startswith(f"{chosen}: OpenVINO was ")
    assert type(ours).__name__ == {"openvino": "OpenvinoBackend", "torch": "TorchBackend"}[chosen]
    assert ("OpenVINO" in reasons["network"]) == (chosen == "openvino"), "the reasons are those of the chosen one"
    assert len(run(ours, rows(3))) == 1


def test_auto_keeps_pytorch_where_each_start_would_convert(open_model: Any) -> None:
    _, reasons = open_model("bert", backend="auto")
    assert reasons["backend"].startswith("torch: ")
    assert "engine.caches.directory" in reasons["backend"]


def test_without_the_package_auto_goes_on_and_the_wish_is_refused(
    open_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.backends.find_spec", lambda _: None)
    _, reasons = open_model("bert", backend="auto", caches=CacheConfig(directory=str(tmp_path)))
    assert "not installed" in reasons["backend"]
    with pytest.raises(ConfigError, match=r"pip install 'sluice-stream\[openvino\]'"):
        open_model("bert")


def test_it_is_refused_on_a_gpu(open_model: Any) -> None:
    with pytest.raises(ConfigError, match="the device is 'cuda:0'"):
        open_model("bert", device="cuda:0")


async def test_the_engine_runs_on_it_and_results_keep_their_identity(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path], converted: CacheConfig
) -> None:
    found = {}
    for backend in ("torch", "openvino"):
        caches = CacheConfig(directory=converted.directory, token_bytes_max=0, result_bytes_max=0)
        engine = await open_engine(section(tiny_models["bert"], backend=backend, caches=caches, fit_seconds_max=0.1))
        analyses = await engine.analyze(["the disk is full", "user login failed", "link lost " * 9], task="embed")
        vectors = [np.frombuffer(each.embedding or b"", "<f2").astype(np.float32) for each in analyses]
        found[backend] = engine.model_version, vectors
        assert engine.plan()["backend"].startswith(f"{backend}: ")
    assert found["torch"][0] == found["openvino"][0]
    assert least_cosine(found["torch"][1], found["openvino"][1]) > EXACT


def test_only_one_place_imports_it() -> None:
    sources = {file.name: file.read_text(encoding="utf-8") for file in Path(backends.__file__).parent.glob("*.py")}
    pattern = re.compile(r"^\s*(?:import openvino\b|from openvino import)", re.MULTILINE)
    assert [name for name, text in sources.items() if pattern.search(text)] == ["openvino_model.py"]


def test_converting_reports_to_nobody_and_prints_nothing(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    program = """
import json, multiprocessing, socket, sys
called = []
def refuse(*arguments, **_):
    called.append(str(arguments))
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
multiprocessing.Process.start = refuse  # which is how it would be sent
from pathlib import Path
from engine import backends, models
from engine.config import EngineConfig
folder = Path(sys.argv[1])
reasons = {}
config = EngineConfig(model=str(folder), backend="openvino", precision="fp32", threads=1)
backends.open_backend(config, models.read_card(str(folder), folder), reasons).close()
print(json.dumps([called, reasons["backend"]]))
"""
    home = tmp_path / "home"
    home.mkdir()
    keep = {name: value for name, value in os.environ.items() if name not in {"CI", "XDG_CONFIG_HOME"}}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tiny_models["bert"])],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**keep, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[], "openvino: configured"]
    assert not (home / "intel").exists(), "where its telemetry keeps who we are"
