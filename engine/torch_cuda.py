"""The network on a CUDA device: copies and computing overlap, launches are replayed.

Two slots take turns. A slot owns pinned host buffers, so that copies are asynchronous, and device buffers.
A batch flows through three streams joined by events: copy in, compute, copy out; while one slot computes,
the other one's ids are on their way in and its results on their way out, already in half precision.

With graphs, shapes are fixed: length is the bucket's edge, rows are filled up to a short ladder
(`BackendInfo.row_steps`), and for each such shape the kernels are captured once into a CUDA graph (bounded, least
recently used first out), whose static inputs are filled from the slot on the compute stream: replays are ordered there,
so one set of static buffers per graph is enough. A shape that cannot be captured runs eagerly for ever.

Fails: `DeviceLost` when the context is dead (a device-side assertion, an illegal access), found by a probe after
each error.
"""

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from engine.backend import BackendInfo, DeviceLost, DeviceMemory
from engine.config import EngineConfig
from engine.network import Network
from engine.packing import cut
from engine.torch_backend import translated_memory

if TYPE_CHECKING:
    from engine.backend import Outputs, Rows

# Ratio 4/3 to 2: rows that only fill up to the next step are cheaper than many graphs.
ROW_LADDER: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_WARMUP_RUNS: Final = 2


@dataclass(slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    ids: Tensor
    lengths: Tensor
    output: Tensor


class _Slot:
    """Buffers of one batch under way. They grow to the largest batch seen and stay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.copied_in = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.busy = False
        self.reserve_input(4096, 256)
        self.host_output = torch.empty(0)

    def reserve_input(self, tokens: int, rows: int) -> None:
        self.host_ids = torch.empty(tokens, dtype=torch.int32, pin_memory=True)
        self.host_lengths = torch.empty(rows, dtype=torch.int32, pin_memory=True)
        self.ids = torch.empty(tokens, dtype=torch.int32, device=self.device)
        self.lengths = torch.empty(rows, dtype=torch.int32, device=self.device)

    def fill(self, rows: "Rows", padded_rows: int, length: int) -> None:
        """Writes a batch into the pinned buffers; rows that only fill up have one token."""
        if padded_rows * length > self.host_ids.numel() or padded_rows > self.host_lengths.numel():
            self.reserve_input(
                max(padded_rows * length, self.host_ids.numel()), max(padded_rows, self.host_lengths.numel())
            )
        ids = self.host_ids.numpy()[: padded_rows * length].reshape(padded_rows, length)
        lengths = self.host_lengths.numpy()[:padded_rows]
        ids.fill(0)
        lengths.fill(1)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            lengths[i] = len(row)

    def output_like(self, output: Tensor) -> Tensor:
        """A pinned buffer for `output`."""
        if self.host_output.dtype != output.dtype or self.host_output.numel() < output.numel():
            self.host_output = torch.empty(output.numel(), dtype=output.dtype, pin_memory=True)
        return self.host_output[: output.numel()].view(output.shape)


@dataclass(slots=True)
class _Ticket:
    slot: _Slot
    output: Tensor
    rows: int


class CudaBackend:
    """A network on one CUDA device. See the module's docstring.

    Args:
        net: on the device, in the precision of `info`.
        info: see `Backend`; depth 2. With graphs, lengths are fixed and rows filled up to `ROW_LADDER`; without, a
            batch is padded to its longest row.
        config: for the number of graphs.
    """

    def __init__(self, net: Network, info: BackendInfo, config: EngineConfig) -> None:
        self._net: Network | None = net
        graphs = config.cuda_graphs_max > 0
        self._info = replace(info, exact_lengths=not graphs, row_steps=ROW_LADDER if graphs else ())
        self._device = torch.device(info.device)
        self._graphs_max = config.cuda_graphs_max
        self._graphs: OrderedDict[tuple[int, int, bool], _Graph | None] = OrderedDict()
        torch.cuda.set_device(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._copy_in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._compute = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copy_out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._slots = [_Slot(self._device) for _ in range(info.depth)]
        torch.cuda.synchronize(self._device)

    @property
    def info(self) -> BackendInfo:
        """See `Backend`."""
        return self._info

    def submit(self, rows: "Rows", length: int) -> object:
        """See `Backend`."""
        slot = next(slot for slot in self._slots if not slot.busy)
        try:
            with torch.inference_mode(), translated_memory():
                return self._enqueue(slot, rows, length)
        except Exception as error:
            # Also since copies of the failed batch may still read the slot's pinned buffers.
            self._probe(error)
            raise

    def _enqueue(self, slot: _Slot, rows: "Rows", length: int) -> _Ticket:
        """Queues copy in, compute and copy out of one batch on their streams."""
        padded_rows = self._info.filled(len(rows))
        slot.fill(rows, padded_rows, length)
        tokens = padded_rows * length
        with torch.cuda.stream(self._copy_in):
            ids = slot.ids[:tokens]
            ids.copy_(slot.host_ids[:tokens], non_blocking=True)
            lengths = slot.lengths[:padded_rows]
            lengths.copy_(slot.host_lengths[:padded_rows], non_blocking=True)
            slot.copied_in.record()
        full = len(rows) == padded_rows and all(len(row) == length for row in rows)
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(slot.copied_in)
            output = self._run(ids.view(padded_rows, length), lengths, full=full)
            slot.computed.record()
        host = slot.output_like(output)
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(slot.computed)
            host.copy_(output, non_blocking=True)
            # The allocator must not hand the output's memory out before the copy has read it.
            output.record_stream(self._copy_out)
            slot.done.record()

        slot.busy = True
        return _Ticket(slot, host, len(rows))

    def collect(self, ticket: object) -> "Outputs":
        """See `Backend`."""
        assert isinstance(ticket, _Ticket)
        try:
            with translated_memory():
                ticket.slot.done.synchronize()
            # A copy: the pinned buffer belongs to the slot's next batch.
            outputs = np.array(ticket.output[: ticket.rows].numpy())
            return cut(outputs, ticket.slot.host_lengths.numpy()[: ticket.rows].tolist())
        except Exception as error:
            self._probe(error)
            raise
        finally:
            ticket.slot.busy = False

    def _probe(self, error: Exception) -> None:
        """Waits for the device after an error: a context that is dead fails everything from then on, this too.

        Raises:
            DeviceLost: the context is dead; only a new process gets another one.
        """
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as dead:
            why = str(error).partition("\n")[0]
            raise DeviceLost(f"the CUDA context is dead: {type(dead).__name__} after: {why}") from error

    def memory(self) -> DeviceMemory:
        """See `Backend`."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(
            torch.cuda.memory_allocated(self._device),
            torch.cuda.memory_reserved(self._device),
            free,
            torch.cuda.max_memory_allocated(self._device),
        )

    def empty_cache(self) -> None:
        """See `Backend`. Graphs go too: their memory pool is the largest thing that can be given back."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def close(self) -> None:
        """See `Backend`."""
        if self._net is not None:
            self._net = None
            self._slots = []
            with suppress(RuntimeError):  # the context is dead, and its memory goes with the process
                self.empty_cache()

    def _run(self, ids: Tensor, lengths: Tensor, *, full: bool) -> Tensor:
        """Computes on the current (compute) stream; the result is the caller's."""
        assert self._net is not None, "the backend is closed"
        graph = self._graph(ids, lengths, full=full)
        if graph is None:
            eager: Tensor = self._net(ids, lengths, full=full)
            return eager
        graph.ids.copy_(ids)
        graph.lengths.copy_(lengths)
        graph.graph.replay()
        # A copy: the next replay of this graph overwrites its output while this one is still on its way
        # out.
        return graph.output.clone()

    def _graph(self, ids: Tensor, lengths: Tensor, *, full: bool) -> _Graph | None:
        if not self._graphs_max:
            return None
        shape = (ids.shape[0], ids.shape[1], full)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            return self._graphs[shape]
        while len(self._graphs) >= self._graphs_max:
            # A graph must not be freed while a replay of it may still run.
            self._compute.synchronize()
            self._graphs.popitem(last=False)
        self._graphs[shape] = captured = self._capture(ids, lengths, full=full)
        return captured

    def _capture(self, ids: Tensor, lengths: Tensor, *, full: bool) -> _Graph | None:
        assert self._net is not None, "the backend is closed"
        static_ids, static_lengths = ids.clone(), lengths.clone()
        for _ in range(_WARMUP_RUNS):  # lazy initialisation of libraries must not be captured
            self._net(static_ids, static_lengths, full=full)
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # `relaxed`: other threads of the process may allocate pinned memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="relaxed"):
                output = self._net(static_ids, static_lengths, full=full)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation of this model cannot be captured: eager is slower, not wrong
            return None
        return _Graph(graph, static_ids, static_lengths, output)
