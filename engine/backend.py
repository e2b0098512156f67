"""The device behind the engine: a loaded model that turns rows of token ids into rows of numbers.

A backend is driven by one thread. `submit` starts a batch and `collect` waits for it, in the order of
submission; up to `info.depth` batches may be under way, so that copying and computing overlap where the
device can do both.

Fails: `DeviceOutOfMemory` from `submit` or `collect`: the batch did not run, the backend is still usable.
`DeviceLost`: the device itself is gone, with every batch under way; the backend can only be closed.
Any other exception concerns that batch alone.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from sluice.errors import Retryable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = Sequence[npt.NDArray[np.int32]]
    Outputs = Sequence[npt.NDArray[np.floating[Any]]]

Precision = Literal["fp32", "bf16", "fp16"]


class DeviceOutOfMemory(Retryable):
    """The batch does not fit into the device's memory now; a smaller one may."""


class DeviceLost(Retryable):
    """The device died: nothing came of what was under way. Another device, or the same one opened anew, may do it."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What is loaded, and how it wants to be driven.

    Attributes:
        device: `cpu`, `cuda:0`.
        precision: of the weights.
        depth: batches that may be under way.
        exact_lengths: pad to the longest row of the batch; otherwise to the bucket's edge (fixed shapes).
        length_max: longest row in tokens.
        embedding_width: numbers of the embedding, at the front of an output row; 0 when there is none.
        labels: of the logits behind the embedding; empty when there are none.
        per_token: an output row is float32 [tokens, labels], one row of logits per token, and nothing else.
        packed: no padding is computed: a batch costs its tokens, and any lengths may share it.
        row_steps: ascending; a batch is filled up with empty rows to the next of these, where there is one.
    """

    device: str
    precision: Precision
    depth: int
    exact_lengths: bool
    length_max: int
    embedding_width: int
    labels: tuple[str, ...] = ()
    packed: bool = False
    per_token: bool = False
    row_steps: tuple[int, ...] = ()

    def filled(self, rows: int) -> int:
        """Rows that the device computes for a batch of `rows` texts."""
        place = bisect_left(self.row_steps, rows)
        return self.row_steps[place] if place < len(self.row_steps) else rows

    def computed(self, lengths: Sequence[int], length: int) -> list[int]:
        """What the device computes for texts of these lengths, padded to `length`: the tokens of each row."""
        return list(lengths) if self.packed else [length] * self.filled(len(lengths))


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the device: in use by tensors, held by the allocator, free, and the highest use since `empty_cache`."""

    allocated: int
    reserved: int
    free: int
    peak: int


class Backend(Protocol):
    """See the module's docstring."""

    @property
    def info(self) -> BackendInfo:
        """What is loaded."""
        ...

    def submit(self, rows: "Rows", length: int) -> object:
        """Starts a batch of int32 rows, each 1 to `length` ids; returns a ticket for `collect`."""
        ...

    def collect(self, ticket: object) -> "Outputs":
        """Waits for a batch; one array per row (float16 without logits, else float32), the caller's for good."""
        ...

    def memory(self) -> DeviceMemory:
        """Memory now."""
        ...

    def empty_cache(self) -> None:
        """Gives back what the allocator holds beyond need and resets the peak."""
        ...

    def close(self) -> None:
        """Releases the model. Idempotent."""
        ...


class Reopen(Protocol):
    """Opens a backend anew after its device died, as often as it is called."""

    def __call__(self) -> Backend:
        """A new backend, opened on the thread that will drive it."""
        ...

    def cancel(self) -> None:
        """Abandons the call that is under way, which raises soon, and refuses all later ones. From any thread."""
        ...


@runtime_checkable
class Mortal(Protocol):
    """A backend whose device can die while nobody looks: another process."""

    @property
    def alive(self) -> bool:
        """Whether it can still take a batch."""
        ...

    def watch(self, on_death: "Callable[[], None]") -> None:
        """Calls `on_death` once, on a thread of its own, when the device has died; at once when it is dead already."""
        ...
