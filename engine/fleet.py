"""The devices that share one queue: what is known about each, and what is done when one dies.

Invariants: a device is driven by one thread; its figures are written there only, and may be read anywhere.

Fails: never by itself; `Recovery` bounds how a device that died is brought back.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.backend import Backend, DeviceMemory, Mortal, Reopen
from engine.config import EngineConfig
from engine.cost import CostTracker
from engine.memory import Admission
from engine.scheduler import Terms


@dataclass(slots=True)
class Device:
    """One lane: a backend, what its batches cost, and how much memory lets a batch have.

    Attributes:
        name: unique among those of one model: `cpu`, `cpu/1`, `cuda:0`.
        backend: driven by one thread.
        costs: may be shared by lanes of one kind.
        admission: its own, since memory may be short on one device only.
        reopen: opens the backend anew after it died; None when that cannot help.
        peaks: bytes at the peak of a warm-up batch, per reporting class; empty where it was not measured.
        alive: whether it takes batches.
        busy_s: time it computed.
        memory: as of some batches ago.
    """

    name: str
    backend: Backend
    costs: CostTracker
    admission: Admission
    reopen: Reopen | None = None
    peaks: dict[int, int] = field(default_factory=dict)
    alive: bool = True
    busy_s: float = 0.0
    batches: int = 0
    rows: int = 0
    losses: int = 0
    memory: DeviceMemory | None = None

    @property
    def died(self) -> bool:
        """Whether the device is known to be dead without having been asked."""
        return isinstance(self.backend, Mortal) and not self.backend.alive

    @property
    def tokens_per_s(self) -> float:
        """What it computes in full batches, by its cost model."""
        model = self.costs.model
        return 1 / (model.typical_token_s + model.launch_s / self.admission.tokens_max)

    def terms(self, waiting_tokens: int, idle: int) -> Terms:
        """On what terms it takes a batch.

        Args:
            waiting_tokens: in the queue.
            idle: devices that have nothing to do, this one included: they share what waits, so that two halves are
                computed side by side. A share is not so small that its launch costs more than its tokens.
        """
        model = self.costs.model
        tokens = self.admission.tokens_max
        if idle > 1:
            least = int(model.launch_s / model.typical_token_s)
            tokens = min(tokens, max(-(-waiting_tokens // idle), least, 1))
        return Terms(tokens, model, self.backend.info.packed, self.backend.info.row_steps)

    def snapshot(self) -> "DeviceStats":
        """Its figures now."""
        return DeviceStats(
            name=self.name,
            alive=self.alive,
            busy_s=self.busy_s,
            batches=self.batches,
            rows=self.rows,
            losses=self.losses,
            tokens_max=self.admission.tokens_max,
            memory=self.memory,
            peaks=dict(self.peaks),
        )


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """Figures of one device; see `Device`.

    Attributes:
        tokens_max: limit of a batch, as far as memory and launch cost are concerned.
        losses: times it died.
    """

    name: str
    alive: bool
    busy_s: float
    batches: int
    rows: int
    losses: int
    tokens_max: int
    memory: DeviceMemory | None
    peaks: dict[int, int]


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a device that died is brought back, and how long one waits for memory.

    Attributes:
        first_s: the longest first pause before it is opened anew.
        max_s: the longest pause.
        gone_s_max: without any device for this long, what waits gets an error and calls are refused, until one is back.
        memory_wait_s_max: a batch, some text of which does not fit even alone, waits for memory this long in all.
    """

    first_s: float = 0.2
    max_s: float = 30.0
    gone_s_max: float = 60.0
    memory_wait_s_max: float = 3.0

    @classmethod
    def of(cls, config: EngineConfig) -> "Recovery":
        """As configured."""
        return cls(
            config.worker_restart_s_first,
            config.worker_restart_s_max,
            config.worker_gone_s_max,
            config.memory_wait_s_max,
        )


EventKind = Literal["lost", "not_restored", "restored", "down", "up"]


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something happened to a device, or to all of them.

    Attributes:
        kind: `lost`: it died. `not_restored`: an attempt to open it anew failed. `restored`: it is back. `down`: no
            device was there for too long; what waited got an error. `up`: one is back after that.
        device: its name.
        detail: why.
    """

    kind: EventKind
    device: str
    detail: str = ""
