"""Opens everything that an engine needs, and notes what was chosen and why."""

import ctypes
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engine import models, tasks
from engine.backend import Backend
from engine.buckets import Ladder
from engine.calibrate import measure_costs, measure_memory
from engine.config import EngineConfig
from engine.cost import CostTracker, Sample, relative_error
from engine.memory import Admission
from engine.models import ModelCard
from engine.scheduler import Limits, Scheduler
from engine.tasks import Task
from engine.tokens import Tokenizer, check

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Descriptions of labels are embedded in batches of this size.
_EMBED_ROWS: Final = 32


@dataclass(slots=True)
class Loaded:
    """A model, ready to run."""

    card: ModelCard
    backend: Backend
    tokenizer: Tokenizer
    ladder: Ladder
    costs: CostTracker
    admission: Admission
    scheduler: Scheduler
    tasks: dict[str, Task]
    reasons: dict[str, str]

    @property
    def version(self) -> str:
        """The model's content (12 digits) and its longest input: what decides which result a text gets.

        Not the precision: `auto` measures it, so it may differ from one start to the next, and a record that is
        analysed again must not look like a new result to the lake. Precisions agree within the tested tolerance.
        """
        return f"{self.card.version}-{self.backend.info.length_max}"


def load(config: EngineConfig) -> Loaded:
    """Loads, measures and prepares; on the thread that will drive the backend.

    Raises:
        Permanent: the model is not there, damaged, or of no use.
        ConfigError: the device is not there.
    """
    _calm_openmp()
    from engine.torch_backend import open_backend

    reasons: dict[str, str] = {}
    card = models.read_card(config.model, models.locate(config.model, allow_download=config.allow_download))
    reasons["model"] = f"{card.name}, version {card.version}, from {card.folder}"
    backend = open_backend(config, card, reasons)
    tokenizer = Tokenizer(models.load_tokenizer(card), backend.info.length_max)
    ladder = Ladder(config.ladder, backend.info.length_max)
    reasons["buckets"] = f"{', '.join(map(str, ladder.edges))} tokens"
    samples = measure_costs(backend, ladder, config.fit_seconds_max)
    costs = CostTracker(samples)
    reasons["cost"] = _cost_reason(costs, samples)
    budget = _budget(config, costs, reasons)
    admission = Admission(budget)
    measure_memory(backend, admission, ladder, config.memory_share_max)
    reasons["memory"] = _memory_reason(admission)
    limits = Limits(
        batch_tokens=budget,
        batch_rows=config.batch_rows_max,
        queue_tokens=config.queue_tokens_max,
        online_share=config.online_share,
        max_wait_s=(config.online_max_wait_ms / 1000, config.background_max_wait_ms / 1000),
        online_batches=config.online_batches_max,
    )
    offered = tasks.build(
        backend.info, config.labels, lambda texts: embed(backend, tokenizer, texts, config.text_bytes_max)
    )
    reasons["tasks"] = ", ".join(sorted(offered))
    zero_shot = offered.get("classify")
    if isinstance(zero_shot, tasks.ZeroShotClassifier):
        reasons["classify"] = (
            f"zero-shot over {len(config.labels)} labels, temperature {zero_shot.temperature} "
            "(calibrated on their descriptions)"
        )
    scheduler = Scheduler(ladder, limits, costs.model)
    _return_memory()
    return Loaded(card, backend, tokenizer, ladder, costs, admission, scheduler, offered, reasons)


def embed(backend: Backend, tokenizer: Tokenizer, texts: Sequence[str], bytes_max: int) -> "npt.NDArray[np.float32]":
    """Embeds a few texts at start-up, [texts, width].

    Raises:
        ConfigError: one of them is no valid text.
    """
    import numpy as np

    from sluice.errors import ConfigError

    for text in texts:
        _, error = check(text, bytes_max)
        if error:
            raise ConfigError(f"engine.labels: description {text!r}: {error}")
    rows = [tokens.ids for tokens in tokenizer.encode(texts)]
    outputs: list[npt.NDArray[np.floating[Any]]] = []
    for start in range(0, len(rows), _EMBED_ROWS):
        part = rows[start : start + _EMBED_ROWS]
        outputs += backend.collect(backend.submit(part, max(len(row) for row in part)))
    return np.stack(outputs)[:, : backend.info.embedding_width].astype(np.float32)


def _calm_openmp() -> None:
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


def _budget(config: EngineConfig, costs: CostTracker, reasons: dict[str, str]) -> int:
    if config.batch_tokens != "auto":
        reasons["batch_tokens"] = f"{config.batch_tokens}: configured"
        return config.batch_tokens
    budget = costs.model.budget_tokens()
    reasons["batch_tokens"] = (
        f"{budget}: a larger batch gains less than 5%, or lasts longer than online texts should wait"
    )
    return budget


def _cost_reason(costs: CostTracker, samples: Sequence[Sample]) -> str:
    model = costs.model
    return (
        f"{model.launch_s * 1e3:.2f} ms a batch + {model.token_s * 1e6:.1f} us a token + "
        f"{model.attention_s * 1e9:.2f} ns a token pair + {model.row_s * 1e6:.1f} us a row; "
        f"{len(samples)} shapes measured, mean error {relative_error(model, samples):.0%}"
    )


def _memory_reason(admission: Admission) -> str:
    if not admission.bytes_per_token:
        return "not measured on a CPU; lowered when memory runs out"
    return (
        f"{admission.bytes_per_token / 1024:.1f} KiB a token at the peak, at most {admission.tokens_max} tokens a batch"
    )
