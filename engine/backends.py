"""Which backend runs a model: PyTorch, or OpenVINO where it is installed and measures faster.

`engine.backend = "auto"` keeps PyTorch unless all of this holds, and says in `reasons["backend"]` which does not:
the device is the CPU; OpenVINO is installed; the model is an encoder whose converted form is kept across restarts
(`engine.caches.directory`: converting costs a second PyTorch load and seconds of tracing, too much for each
start); it converts; and it is faster by `GAIN_MIN` in turns with PyTorch on the same texts. Which of the two runs is
no part of a result's identity: they agree within the tolerance of their precision.

Fails: `ConfigError` when `openvino` is configured and cannot be had; `Permanent` as the model's loading does.
"""

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import msgspec

from engine.backend import Backend
from engine.config import EngineConfig
from engine.models import ModelCard
from engine.probe import PROBE_LENGTH, PROBE_ROWS, measure, probe_batch
from sluice.errors import ConfigError, SluiceError

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

# OpenVINO must earn its memory, and the risk of a second implementation.
GAIN_MIN: Final = 1.1
INSTALL: Final = "pip install 'sluice-stream[openvino]'"
# Of `ModelCard.kind`: what is one pass over a text.
ENCODERS: Final = frozenset({"embedding", "classification", "tokens"})


def open_backend(config: EngineConfig, card: ModelCard, reasons: dict[str, str], threads: int = 0) -> Backend:
    """Loads the model and returns it running on the configured device. Call it on the thread that will drive it.

    Args:
        config: the engine's section.
        card: of the model.
        reasons: takes what is decided here, and why; `reasons["backend"]` begins with `torch:` or `openvino:`.
        threads: of the CPU; 0: as configured.

    Raises:
        ConfigError: the device or the backend is not there.
        Permanent: the model is damaged, or cannot be converted and OpenVINO is configured.
    """
    config = msgspec.structs.replace(config, threads=threads or config.threads)
    if config.backend == "openvino":
        return _openvino(config, card, reasons)
    against = "configured" if config.backend == "torch" else obstacle(config, card)
    if against:
        reasons["backend"] = f"torch: {against}"
        return _torch(config, card, reasons)
    return _faster(config, card, reasons)


def obstacle(config: EngineConfig, card: ModelCard) -> str:
    """Why OpenVINO is not even tried under `auto`; empty when it is."""
    if not installed():
        return f"OpenVINO is not installed ({INSTALL})"
    if card.kind not in ENCODERS:
        return "OpenVINO runs encoders only here"
    if not _on_cpu(config.device):
        return "the device is not the CPU"
    if not config.caches.directory:
        return "OpenVINO was not tried: without engine.caches.directory each start would convert the model anew"
    return ""


def installed() -> bool:
    """Whether the optional package is there; it is not imported."""
    return find_spec("openvino") is not None


def _openvino(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> Backend:
    """OpenVINO, because it is configured."""
    if config.device not in {"auto", "cpu"}:
        raise ConfigError(
            f"engine.backend: openvino runs on the CPU, but the device is '{config.device}': set engine.device to cpu"
        )
    if card.kind not in ENCODERS:
        raise ConfigError(f"engine.backend: openvino runs encoders only, and model '{card.name}' is none")
    if not installed():
        raise ConfigError(f"engine.backend: openvino is not installed: {INSTALL}")
    from engine.openvino_backend import open_backend as open_openvino

    backend = open_openvino(config, card, reasons)
    reasons["backend"] = "openvino: configured"
    return backend


def _torch(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> Backend:
    from engine.torch_backend import open_backend as open_torch

    return open_torch(config, card, reasons)


def _faster(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> Backend:
    """Opens both, and keeps the one that is worth it."""
    notes: dict[str, str] = {}
    try:
        candidate = _openvino(msgspec.structs.replace(config, device="cpu"), card, notes)
    except (SluiceError, ImportError) as error:
        reasons["backend"] = f"torch: OpenVINO was tried: {error}"
        return _torch(config, card, reasons)
    try:
        usual = _torch(config, card, reasons)
    except BaseException:
        candidate.close()
        raise
    rows = probe_batch(min(usual.info.length_max, candidate.info.length_max))
    (_, torch_s), (_, openvino_s) = measure(*(partial(_run, each, rows) for each in (usual, candidate)))
    gain = torch_s / openvino_s
    measured = f"OpenVINO was {gain:.2f} times as fast on {PROBE_ROWS} texts of {PROBE_LENGTH} tokens"
    if gain < GAIN_MIN:
        candidate.close()
        reasons["backend"] = f"torch: {measured}; {GAIN_MIN} is asked for"
        return usual
    usual.close()
    reasons.update(notes)
    reasons["backend"] = f"openvino: {measured}"
    return candidate


def _run(backend: Backend, rows: "Rows") -> "Outputs":
    return backend.collect(backend.submit(rows, max(len(row) for row in rows)))


def _on_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()
