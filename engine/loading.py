"""Opens everything that an engine needs, and notes what was chosen and why."""

import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engine import models, tasks
from engine.backend import Backend, BackendInfo
from engine.buckets import Ladder
from engine.calibrate import measure_devices
from engine.config import EngineConfig
from engine.devices import Opened, open_devices
from engine.fleet import Device
from engine.labels import DEFAULT_LABELS
from engine.model_place import locate
from engine.models import ModelCard
from engine.scheduler import Limits, Scheduler
from engine.sentence_folder import prompts_of
from engine.tasks import Task
from engine.tokens import Tokenizer, check
from sluice.errors import ConfigError, Permanent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Descriptions of labels are embedded in batches of this size.
_EMBED_ROWS: Final = 32
# The default of engine.span_aggregation: it leaves no mark in the version.
_AGGREGATION: Final = "simple"


@dataclass(slots=True)
class Loaded:
    """A model, ready to run.

    Attributes:
        card: of the model.
        devices: that it runs on, at least one. The first is driven by the thread that called `load`.
        tokenizer: of the model.
        ladder: the classes of lengths that the scheduler groups by.
        scheduler: the queue that the devices share.
        tasks: that the model offers.
        reasons: what was chosen, and why.
        pooling: the effective one where it is not the model's own; else empty.
        reading: digest of what decides how outputs are read, where it is not the default; else empty.
    """

    card: ModelCard
    devices: list[Device]
    tokenizer: Tokenizer
    ladder: Ladder
    scheduler: Scheduler
    tasks: dict[str, Task]
    reasons: dict[str, str]
    pooling: str = ""
    reading: str = ""

    @property
    def info(self) -> BackendInfo:
        """Of the first device; what a result looks like is the same on all of them."""
        return self.devices[0].backend.info

    def close(self) -> None:
        """Releases the devices; the runner has ended before. Idempotent."""
        for device in self.devices:
            device.backend.close()

    @property
    def output_version(self) -> str:
        """What decides which raw output a text gets: what the result cache goes by.

        The model's content (12 digits), its longest input, and the pooling where it is not the model's own.
        """
        return "-".join(filter(None, (self.card.version, str(self.info.length_max), self.pooling)))

    @property
    def version(self) -> str:
        """What decides which result a text gets: `output_version`, then `reading` where it is not the default.

        Not the precision: `auto` measures it, so it may differ from one start to the next, and a record that is
        analysed again must not look like a new result to the lake. Precisions agree within the tested tolerance.
        """
        return "-".join(filter(None, (self.output_version, self.reading)))


def load(config: EngineConfig) -> Loaded:
    """Loads, measures and prepares; on the thread that will drive the first device.

    Raises:
        Permanent: the model is not there, damaged, or of no use.
        ConfigError: the device is not there.
        Retryable: the device is short of memory, or died.
    """
    calm_openmp()
    reasons: dict[str, str] = {}
    card = models.read_card(config.model, locate(config.model, allow_download=config.allow_download))
    reasons["model"] = f"{card.name}, version {card.version}, from {card.folder}"
    if prompts := prompts_of(card.folder):
        reasons["prompts"] = (
            f"none is added: the model knows {', '.join(prompts)}, to be put in front of texts by callers"
        )
    with _runnable(card):
        opened = open_devices(config, card, reasons)
        try:
            return _prepare(config, card, opened, reasons)
        except BaseException:
            for each in opened:
                each.backend.close()
            raise


@contextmanager
def _runnable(card: ModelCard) -> Iterator[None]:
    """What a model that was loaded fails with when it is run for the first time, as Permanent.

    Not a RuntimeError: a device that fails for the moment raises those, and then the next start may be fine.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # say, one of images has no place for ids
        raise Permanent(
            f"model '{card.name}' from {card.folder} cannot be run ({models.in_short(error)}): "
            "it is damaged, or no model of texts; copy or download it again, or choose another one"
        ) from error


def _prepare(config: EngineConfig, card: ModelCard, opened: Sequence[Opened], reasons: dict[str, str]) -> Loaded:
    backend = opened[0].backend
    with models.translated(card, "tokenizer"):
        tokenizer = Tokenizer(models.load_tokenizer(card), backend.info.length_max)
    ladder = Ladder(config.ladder, backend.info.length_max)
    reasons["buckets"] = f"{', '.join(map(str, ladder.edges))} tokens"
    devices = measure_devices(config, opened, ladder, reasons)
    # Where any length will do, texts of nearly equal length are grouped inside the buckets.
    if all(each.backend.info.exact_lengths or each.backend.info.packed for each in opened):
        ladder = ladder.refined()
    limits = Limits(
        batch_tokens=max(device.admission.tokens_max for device in devices),
        batch_rows=config.batch_rows_max,
        queue_tokens=config.queue_tokens_max,
        online_share=config.online_share,
        max_wait_s=(config.online_max_wait_ms / 1000, config.background_max_wait_ms / 1000),
        online_batches=config.online_batches_max,
    )
    offered = tasks.build(
        backend.info,
        config.labels,
        lambda texts: embed(card, backend, tokenizer, texts, config.text_bytes_max),
        tokenizer.align,
        config.span_aggregation,
        str(card.config.get("problem_type") or ""),
    )
    reasons["tasks"] = ", ".join(sorted(offered))
    zero_shot = offered.get("classify")
    if isinstance(zero_shot, tasks.ZeroShotClassifier):
        reasons["classify"] = (
            f"zero-shot over {len(config.labels)} labels, temperature {zero_shot.temperature} "
            "(calibrated on their descriptions)"
        )
    scheduler = Scheduler(ladder, limits, devices[0].costs.model)
    _return_memory()
    pooling, reading = _pooling(config, card), _reading(config, offered)
    return Loaded(card, devices, tokenizer, ladder, scheduler, offered, reasons, pooling, reading)


def _pooling(config: EngineConfig, card: ModelCard) -> str:
    """The configured pooling where it changes what the model's own would give; else empty."""
    pooled = card.kind in {"embedding", "classification"}
    return config.pooling if pooled and config.pooling not in {"auto", card.pooling} else ""


def _reading(config: EngineConfig, offered: Mapping[str, Task]) -> str:
    """8 hexadecimal digits over labels or aggregation, when a task reads by them and they are not the defaults."""
    if isinstance(offered.get("tokens"), tasks.TokenClassifier) and config.span_aggregation != _AGGREGATION:
        decides: object = config.span_aggregation
    elif isinstance(offered.get("classify"), tasks.ZeroShotClassifier) and config.labels != DEFAULT_LABELS:
        decides = sorted((name, list(descriptions)) for name, descriptions in config.labels.items())
    else:
        return ""
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]


def vocabulary_of(card: ModelCard) -> int:
    """Tokens that a model knows; 0 when it does not say."""
    size = card.config.get("vocab_size")
    return size if isinstance(size, int) else 0


def embed(
    card: ModelCard, backend: Backend, tokenizer: Tokenizer, texts: Sequence[str], bytes_max: int
) -> "npt.NDArray[np.float32]":
    """Embeds the labels' descriptions, [texts, width]: the first texts that a model sees.

    Raises:
        ConfigError: one of them is no valid text.
        Permanent: tokenizer and weights do not belong together, or the weights are no numbers.
    """
    import numpy as np

    for text in texts:
        _, error = check(text, bytes_max)
        if error:
            raise ConfigError(f"engine.labels: description {text!r}: {error}")
    rows = [tokens.ids for tokens in tokenizer.encode(texts)]
    known, highest = vocabulary_of(card), max(int(row.max()) for row in rows)
    if 0 < known <= highest:
        raise Permanent(
            f"model '{card.name}': {card.folder / 'tokenizer.json'} is of another model: it gives token {highest}, and "
            f"this one knows {known}; copy or download the model again"
        )
    outputs: list[npt.NDArray[np.floating[Any]]] = []
    for start in range(0, len(rows), _EMBED_ROWS):
        part = rows[start : start + _EMBED_ROWS]
        outputs += backend.collect(backend.submit(part, max(len(row) for row in part)))
    vectors = np.stack(outputs)[:, : backend.info.embedding_width].astype(np.float32)
    if not np.isfinite(vectors).all():
        raise Permanent(
            f"model '{card.name}': what it computes is not finite (NaN or infinity): the weights in {card.folder} are "
            "damaged, copy or download the model again; or set engine.precision to fp32"
        )
    return vectors


def calm_openmp() -> None:
    """Lets OpenMP's threads sleep at their barriers instead of spinning; before PyTorch is imported, unless it is set.

    Spinning threads are worth a few percent on a machine of our own. Where anything else runs beside us
    (here: brokers, a second engine), they burn the time that the others need to reach the barrier: 83
    texts/s instead of 12, two threads on two cores beside one busy process.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _return_memory() -> None:
    """Gives the heap that loading used back to the system (63 MB with MiniLM); glibc keeps it otherwise."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
