"""A device for tests, and an engine's parts around it.

`FakeBackend` passes the same conformance suite as the real ones. It runs out of memory at will: above a number of
padded tokens, or at chosen submissions; it fails on rows that hold a poisoned id, and takes its process with it on
rows that hold a deadly one. In a worker process (`open_fake`) it can be caught in the middle of a batch.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine import tasks
from engine.backend import Backend, BackendInfo, DeviceLost, DeviceMemory, DeviceOutOfMemory
from engine.buckets import Ladder
from engine.config import EngineConfig
from engine.cost import CostTracker
from engine.fleet import Device
from engine.loading import Loaded, embed
from engine.memory import Admission
from engine.models import ModelCard
from engine.scheduler import Limits, Scheduler
from engine.tokens import Tokenizer

WIDTH = 32
_DIRECTIONS = np.random.default_rng(7).normal(size=(4096, WIDTH)).astype(np.float32)


def byte_tokenizer(length_max: int = 64) -> Tokenizer:
    """A real fast tokenizer, made here: a token per byte between [CLS] and [SEP]."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"[CLS]": 0, "[SEP]": 1, **{symbol: i + 2 for i, symbol in enumerate(alphabet)}}
    fast = Fast(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return Tokenizer(fast, length_max)


@dataclass
class FakeBackend:
    """A bag of ids as a vector: right whatever the padding and the neighbours are."""

    depth: int = 1
    exact_lengths: bool = True
    packed: bool = False
    row_steps: Sequence[int] = ()
    length_max: int = 64
    memory_tokens: int = 1 << 30
    fail_submissions: set[int] = field(default_factory=set)
    lose_submissions: set[int] = field(default_factory=set)
    lose_collections: set[int] = field(default_factory=set)
    poison: int = -1
    deadly: int = -1
    hang_once: str = ""
    memory_unknown: bool = False
    peak_tokens: int = 0
    batches: list[tuple[int, int]] = field(default_factory=list)
    submissions: int = 0
    collections: int = 0
    emptied: int = 0
    closed: bool = False
    gate: threading.Event | None = None
    started: threading.Event = field(default_factory=threading.Event)

    @property
    def info(self) -> BackendInfo:
        return BackendInfo(
            "fake",
            "fp32",
            self.depth,
            self.exact_lengths,
            self.length_max,
            WIDTH,
            packed=self.packed,
            row_steps=tuple(self.row_steps),
        )

    def submit(self, rows: Sequence[npt.NDArray[np.int32]], length: int) -> object:
        assert rows
        assert all(0 < len(row) <= length <= self.length_max for row in rows)
        self.submissions += 1
        filled = min((step for step in self.row_steps if step >= len(rows)), default=len(rows))
        computed = sum(map(len, rows)) if self.packed else filled * length
        if computed > self.memory_tokens or self.submissions in self.fail_submissions:
            raise DeviceOutOfMemory(f"{len(rows)} rows of {length}")
        if self.submissions in self.lose_submissions:
            raise DeviceLost("the test took it away")
        self.peak_tokens = max(self.peak_tokens, computed)
        self.batches.append((len(rows), length))
        return [np.array(row) for row in rows]

    def collect(self, ticket: object) -> list[npt.NDArray[np.float16]]:
        assert isinstance(ticket, list)
        self.collections += 1
        if self.collections in self.lose_collections:
            raise DeviceLost("the test took it away")
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(30), "the test forgot to open the gate"
        if self.hang_once:
            hang_once(Path(self.hang_once))
        if any(self.poison in row for row in ticket):
            raise RuntimeError("poisoned")
        if any(self.deadly in row for row in ticket):
            os.kill(os.getpid(), signal.SIGKILL)
        return [embedding(row) for row in ticket]

    def memory(self) -> DeviceMemory:
        if self.memory_unknown:
            raise RuntimeError("no figures")
        return DeviceMemory(0, 0, 1 << 30, 1000 * self.peak_tokens)

    def empty_cache(self) -> None:
        self.emptied += 1
        self.peak_tokens = 0

    def close(self) -> None:
        self.closed = True


def hang_once(fifo: Path) -> None:
    """Says through a named pipe that a batch is under way and hangs; goes on at once when somebody did so before."""
    try:
        fifo.with_suffix(".first").touch(exist_ok=False)
    except FileExistsError:
        return
    fifo.write_text(str(os.getpid()), encoding="ascii")
    threading.Event().wait()


def open_fake(**arguments: Any) -> tuple[FakeBackend, dict[str, str]]:
    """An opener for worker processes."""
    return FakeBackend(**arguments), {"fake": "yes"}


def open_never(fifo: str) -> tuple[FakeBackend, dict[str, str]]:
    """An opener that says through a named pipe that it is at work, and never ends."""
    Path(fifo).write_text(str(os.getpid()), encoding="ascii")
    threading.Event().wait()
    raise AssertionError


@dataclass
class Again:
    """Opens a device anew, in this process, as the test says."""

    open: Callable[[], Backend]
    cancelled: bool = False

    def __call__(self) -> Backend:
        return self.open()

    def cancel(self) -> None:
        self.cancelled = True


def embedding(ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.float16]:
    """What the fake makes of a row."""
    total = _DIRECTIONS[np.asarray(ids) % len(_DIRECTIONS)].sum(0)
    return (total / np.linalg.norm(total)).astype(np.float16)


LABELS = {"good": ("all fine", "it works well"), "bad": ("it is broken", "a failure")}


def fake_loader(
    backend: Any, *, tokenizer: Tokenizer | None = None, batch_tokens: int = 256
) -> Callable[[EngineConfig], Loaded]:
    """A loader for `Engine` around a given backend."""

    def load(config: EngineConfig) -> Loaded:
        tokens = tokenizer or byte_tokenizer(backend.info.length_max)
        ladder = Ladder(config.ladder, backend.info.length_max)
        costs = CostTracker()
        if backend.info.exact_lengths or backend.info.packed:
            ladder = ladder.refined()
        budget = batch_tokens if config.batch_tokens == "auto" else config.batch_tokens
        waits = (config.online_max_wait_ms / 1000, config.background_max_wait_ms / 1000)
        limits = Limits(budget, config.batch_rows_max, config.queue_tokens_max, config.online_share, waits)
        gate, backend.gate = getattr(backend, "gate", None), None
        card = ModelCard("fake", Path(), "0" * 12, "embedding", backend.info.length_max, "mean", (), {})
        describe = partial(embed, card, backend, tokens, bytes_max=config.text_bytes_max)
        offered = tasks.build(backend.info, LABELS, describe)
        backend.gate = gate
        if hasattr(backend, "started"):
            backend.started.clear()
            backend.batches.clear()
            backend.submissions = 0
        scheduler = Scheduler(ladder, limits, costs.model)
        device = Device("fake", backend, costs, Admission(budget))
        return Loaded(card, [device], tokens, ladder, scheduler, offered, {"model": "fake"})

    return load
