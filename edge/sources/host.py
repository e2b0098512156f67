"""This host's own measurements, by psutil: one record per group and sample, numbers as metrics.

Counters (bytes sent, disk reads) are given as the system has them, since the start of the host: a rate is a difference
that the reader can take over any time. A group that this host does not have (temperatures, mostly) is left out.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Final

import psutil

from edge.config import HostConfig
from edge.records import Chunk, RecordRefused, serialize
from edge.sources.base import RECORD_REFUSED, SourceContext, StopFlag, delivery
from sluice.delivery import Delivery
from sluice.record import Record

Sample = Mapping[str, float]


class HostSource:
    """See the module's docstring."""

    def __init__(self, config: HostConfig, context: SourceContext) -> None:
        self._config = config
        self._context = context
        self._stop = StopFlag()
        # The first call of cpu_percent has nothing to compare with, and gives 0.
        psutil.cpu_percent()

    @property
    def name(self) -> str:
        """Its identity."""
        return self._config.identity

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()

    async def deliveries(self) -> AsyncGenerator[Delivery[Chunk], None]:
        """One chunk per sample."""
        while not self._stop.is_set:
            # Sensors may take their time to answer.
            frames = await asyncio.to_thread(self._frames)
            if frames:
                yield delivery(Chunk(self._config.key, frames, self._context.now_us()))
            await self._stop.wait(self._config.interval_s)

    def _frames(self) -> list[bytes]:
        now_us = self._context.now_us()
        frames = []
        for group in self._config.groups:
            for metrics, labels in _GROUPS[group](self._config):
                record = Record(now_us, metrics=metrics, labels={"group": group, **labels})
                try:
                    frames.append(serialize(record, self._context.limits))
                except RecordRefused as error:
                    self._context.telemetry.emit(RECORD_REFUSED, source=self.name, reason=error.reason.value)
        return frames


def _cpu(_config: HostConfig) -> Iterator[tuple[Sample, Mapping[str, str]]]:
    load_1m, load_5m, load_15m = psutil.getloadavg()
    yield (
        {
            "cpu_percent": psutil.cpu_percent(),
            "cpu_count": float(psutil.cpu_count() or 0),
            "load_1m": load_1m,
            "load_5m": load_5m,
            "load_15m": load_15m,
        },
        {},
    )


def _memory(_config: HostConfig) -> Iterator[tuple[Sample, Mapping[str, str]]]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    yield (
        {
            "total_bytes": float(memory.total),
            "available_bytes": float(memory.available),
            "used_percent": memory.percent,
            "swap_used_bytes": float(swap.used),
        },
        {},
    )


def _disk(config: HostConfig) -> Iterator[tuple[Sample, Mapping[str, str]]]:
    for mount in config.disks:
        try:
            usage = psutil.disk_usage(mount)
        except OSError:
            # A mount point that is not there now.
            continue
        yield (
            {"total_bytes": float(usage.total), "free_bytes": float(usage.free), "used_percent": usage.percent},
            {"mount": mount},
        )
    counters = psutil.disk_io_counters()
    if counters is not None:
        yield {"read_bytes": float(counters.read_bytes), "write_bytes": float(counters.write_bytes)}, {}


def _network(_config: HostConfig) -> Iterator[tuple[Sample, Mapping[str, str]]]:
    for name, counters in psutil.net_io_counters(pernic=True).items():
        yield (
            {
                "sent_bytes": float(counters.bytes_sent),
                "received_bytes": float(counters.bytes_recv),
                "errors": float(counters.errin + counters.errout),
                "dropped": float(counters.dropin + counters.dropout),
            },
            {"interface": name},
        )


def _temperature(_config: HostConfig) -> Iterator[tuple[Sample, Mapping[str, str]]]:
    # Not every platform has the function.
    read = getattr(psutil, "sensors_temperatures", dict)
    for chip, sensors in read().items():
        for i, sensor in enumerate(sensors):
            yield {"celsius": float(sensor.current)}, {"chip": chip, "sensor": sensor.label or str(i)}


_GROUPS: Final[Mapping[str, Callable[[HostConfig], Iterator[tuple[Sample, Mapping[str, str]]]]]] = {
    "cpu": _cpu,
    "memory": _memory,
    "disk": _disk,
    "network": _network,
    "temperature": _temperature,
}
