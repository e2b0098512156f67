"""A model in OpenVINO's own form: converted from PyTorch, and kept in a directory so that the next start is quick.

A kept model is a folder `openvino/<key>` under the caches' directory: `model.xml` and `model.bin` (weights in
fp32, whatever precision computes later) and `manifest.json`, which is written before the folder gets its name and
holds size and CRC-32C of both. The key names everything that decides the content. Invariants: what is read was
complete and undamaged; anything else is removed and converted anew. A directory that cannot be written costs the
speed of the next start only.

OpenVINO reports its use over the network when it is imported, and again in `openvino.convert_model`; no text of a
site may come near that. `library` imports it without, and the conversion calls its PyTorch frontend directly. What
was converted is compared with PyTorch before it is used.

Fails: `Permanent` when a model cannot be converted, or computes something else afterwards.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from engine import models
from engine.config import EngineConfig
from engine.models import ModelCard
from engine.packing import pad
from sluice import __version__
from sluice.errors import Permanent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engine.network import Network

# Raised with every change of what is converted or how it is kept.
FORMAT: Final = 1
# Models kept: the one in use and the one before, for a rollback.
KEPT_MAX: Final = 2
# No conversion lasts that long: what is unfinished and older was cut short.
STALE_S: Final = 3600.0
MANIFEST: Final = "manifest.json"
FILES: Final = ("model.xml", "model.bin")
# Largest difference from PyTorch, as a share of the largest output; rounding is far below, a wrong graph far above.
DIFFERENCE_MAX: Final = 5e-3
# Lengths of the rows of the batches that are compared: other shapes than the traced one, with and without padding.
_CHECKED: Final = ((1,), (19, 2, 11, 5, 1), (48, 33), (6, 6))
_CHUNK_BYTES: Final = 1 << 20


def library() -> Any:
    """The module `openvino`; the only way that the project imports it.

    Its telemetry is a package of its own, which it can do without: to an import that fails it answers with a stub.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None refuses the import
    import openvino

    return openvino


@cache
def shared_core() -> Any:
    """The one `openvino.Core` of this process, for good.

    Its CPU plugin gives the thread that loads it a signal stack of its own, and unmaps that stack when it is unloaded.
    With two of them, unloaded in the order of loading, the thread is left on a stack that is gone: the next signal
    is a segmentation fault (seen with 2026.4).
    """
    return library().Core()


@dataclass(frozen=True, slots=True)
class Source:
    """What is converted.

    Attributes:
        card: of the model.
        pooling: how token vectors become one.
        length_max: longest row in tokens.
    """

    card: ModelCard
    pooling: Literal["mean", "cls"]
    length_max: int

    @property
    def key(self) -> str:
        """Names the converted model's content: model, what the network computes, and who converted it."""
        parts = (self.card.version, self.length_max, self.pooling, library().__version__, __version__, FORMAT)
        return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(map(str, parts)))


def source(config: EngineConfig, card: ModelCard) -> Source:
    """What the configuration makes of a model."""
    pooling = card.pooling if config.pooling == "auto" else config.pooling
    return Source(card, pooling, min(config.length_tokens_max or card.length_max, card.length_max))


def load(core: Any, wanted: Source, directory: str) -> tuple[Any, str]:
    """The model, `openvino.Model` with int32 inputs ids [rows, length] and lengths [rows], and where it came from.

    Args:
        core: `openvino.Core`.
        wanted: the model.
        directory: of the engine's caches; empty: nothing is kept.
    """
    if not directory:
        return convert(core, wanted), "converted at this start"
    root = Path(directory) / "openvino"
    folder = root / wanted.key
    if _whole(folder):
        os.utime(folder)
        return core.read_model(folder / FILES[0]), f"read from {folder}"
    shutil.rmtree(folder, ignore_errors=True)
    model = convert(core, wanted)
    try:
        _keep(model, root, folder)
    except OSError as error:
        return model, f"converted at this start; it cannot be kept in {root}: {error}"
    # Read back: the weights are then pages of the file, and PyTorch's copy can go.
    return core.read_model(folder / FILES[0]), f"converted, and kept in {folder}"


def convert(core: Any, wanted: Source) -> Any:
    """Converts with PyTorch, and compares.

    Raises:
        Permanent: it cannot be converted, or the outputs differ.
    """
    from engine import network

    net = network.build(models.load_model(wanted.card), wanted.card, wanted.pooling, wanted.length_max)
    name = wanted.card.name
    try:
        with _calm():
            expected = _expected(net, wanted.length_max)
            model = _trace(net, wanted.length_max)
            difference = _difference(core, model, expected, wanted.length_max)
    except Exception as error:  # tracing, the frontend and the plugin raise what they like
        first = str(error).strip().partition("\n")[0]
        raise Permanent(f"model '{name}': OpenVINO cannot convert it: {type(error).__name__}: {first}") from error
    if not difference <= DIFFERENCE_MAX:
        raise Permanent(f"model '{name}': converted to OpenVINO it differs from PyTorch by {difference:.1%}")
    return model


def _trace(net: "Network", length_max: int) -> Any:
    """The graph; takes `net` over."""
    import torch

    openvino = library()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from engine.openvino_graph import Masked

    example = tuple(torch.from_numpy(each) for each in _example((7, 3, 1), length_max))
    with torch.no_grad():
        # It must live until the conversion is done.
        decoder = TorchScriptPythonDecoder(Masked(net).eval(), example_input=example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    if [each.get_any_name() for each in model.inputs] != ["ids", "lengths"]:
        raise ValueError("the graph's inputs are not ids and lengths")
    model.reshape({"ids": openvino.PartialShape([-1, -1]), "lengths": openvino.PartialShape([-1])})
    return model


def _expected(net: "Network", length_max: int) -> "list[npt.NDArray[Any]]":
    """What PyTorch computes for the batches of `_CHECKED`."""
    import torch

    outputs = []
    for wanted in _CHECKED:
        ids, lengths = (torch.from_numpy(each) for each in _example(wanted, length_max))
        with torch.inference_mode():
            outputs.append(net(ids, lengths, full=False).float().numpy())
    return outputs


def _difference(core: Any, model: Any, expected: "Sequence[npt.NDArray[Any]]", length_max: int) -> float:
    """Largest difference from what is expected, as a share of the largest output."""
    import numpy as np

    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    worst = 0.0
    for wanted, right in zip(_CHECKED, expected, strict=True):
        ids, lengths = _example(wanted, length_max)
        got = request.infer([ids, lengths])[0].astype(np.float32)
        if got.shape != right.shape:
            raise ValueError(f"outputs of shape {got.shape} instead of {right.shape}")
        # Of outputs per token only the real ones: what is computed for padding means nothing.
        real = np.arange(ids.shape[1])[None, :] < lengths[:, None] if got.ndim == 3 else np.s_[:]
        worst = max(worst, float(np.abs(got - right)[real].max() / np.abs(right[real]).max()))
    return worst


def _example(wanted: Sequence[int], length_max: int) -> "tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]":
    """A padded batch of rows of these lengths, or as long as the model allows."""
    import numpy as np

    chance = np.random.default_rng(7)
    # Small ids exist in every vocabulary.
    rows = [chance.integers(1, 50, min(length, length_max), dtype=np.int32) for length in wanted]
    return pad(rows, max(len(row) for row in rows))


def _keep(model: Any, root: Path, folder: Path) -> None:
    """Writes beside, then renames: a folder with its name is complete."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        try:
            library().save_model(model, beside / FILES[0], compress_to_fp16=False)
        except RuntimeError as error:  # how OpenVINO says that a disk is full
            raise OSError(str(error).strip().partition("\n")[0]) from error
        manifest = {name: [(beside / name).stat().st_size, _crc32c(beside / name)] for name in FILES}
        (beside / MANIFEST).write_text(json.dumps(manifest), encoding="ascii")
        if not _whole(folder):  # another process may have been quicker
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _prune(root)


def _prune(root: Path) -> None:
    """Removes all but the latest models, and what is left of conversions that were cut short."""
    folders = [(each.stat().st_mtime, each) for each in root.iterdir() if each.is_dir()]
    kept = sorted(folder for folder in folders if not folder[1].name.startswith("."))
    stale = [folder for folder in folders if folder[1].name.startswith(".") and folder[0] < time.time() - STALE_S]
    for _, each in [*kept[:-KEPT_MAX], *stale]:
        shutil.rmtree(each, ignore_errors=True)


def _whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="ascii"))
        return all(manifest[name] == [(folder / name).stat().st_size, _crc32c(folder / name)] for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _crc32c(file: Path) -> int:
    import google_crc32c

    value = 0
    with file.open("rb") as content:
        while part := content.read(_CHUNK_BYTES):
            value = google_crc32c.extend(value, part)
    return int(value)


@contextmanager
def _calm() -> Iterator[None]:
    """No advice from tracing: `torch.jit.trace` is deprecated and warns of constants; the comparison judges those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
