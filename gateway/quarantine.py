"""What cannot be processed: kept on the site for a person to look at, and declared to the cloud without its content.

Nobody has looked at these bytes, so they may hold anything, and they never leave the site: they are written to a
directory of ours (0700, files 0600), each as a `Quarantined` message with the original and the full reason. What goes
to Kafka is the notice: identity, size and the reason's name. Not the reason's text either, which may quote the input.

When the envelope's claim can be trusted (it names the device whose topic it came on) its positions are declared in a
receipt, so that the ledger closes and the device's spool can go on.

Bounded by bytes and files. When it is full, the original is *not* kept: that is an event, and the receipt declares the
positions dropped instead of quarantined, since that is the truth. Oldest files are never overwritten: they may be the
ones that somebody looks for.
The same bytes are kept and announced once.
"""

import asyncio
import contextlib
import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from gateway.batches import ExportBatch
from gateway.path_config import QuarantineConfig
from protos import record_pb2
from sluice.codec import RejectReason
from sluice.errors import ConfigError
from sluice.record import GapReason, RecordBatch, merge_gaps
from sluice.telemetry import Event, Telemetry

QUARANTINED = Event(
    name="envelope_quarantined",
    unit="envelopes",
    help="Envelopes that could not be processed.",
    labels=("reason",),
    level="warning",
)
NOT_KEPT = Event(
    name="quarantine_not_kept",
    unit="envelopes",
    help="Quarantined envelopes whose bytes could not be kept: the quarantine or the disk is full.",
    labels=("reason",),
    level="error",
)
SUFFIX: Final = ".quarantined.pb"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An envelope that cannot be processed.

    Attributes:
        site, device_id: of the topic that it came on; the device may be empty when the topic names none.
        payload: the original bytes.
        detail: may quote the input: never leaves the site.
        claim: its range as a batch of gaps, when the claim can be trusted; else None.
    """

    site: str
    device_id: str
    payload: bytes
    reason: RejectReason
    detail: str
    received_time_us: int
    claim: RecordBatch | None = None


class NoticeWriter(Protocol):
    """Where notices become durable (`KafkaWriter`)."""

    async def write(self, topic: str, key: str, value: bytes, headers: dict[str, str | bytes]) -> object:
        """Returns if and only if the message is durable."""
        ...


class ReceiptSink(Protocol):
    """Where receipts become durable (`Bridge`)."""

    async def write(self, batch: ExportBatch) -> None:
        """Returns if and only if the receipt is durable."""
        ...


class QuarantineStore:
    """The directory. Its methods block.

    Raises:
        ConfigError: when the directory cannot be made.
    """

    def __init__(self, config: QuarantineConfig) -> None:
        self._config = config
        self._directory = Path(config.directory)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for leftover in self._directory.glob("*.tmp"):
                leftover.unlink()
            sizes = [entry.stat().st_size for entry in self._directory.glob(f"*{SUFFIX}")]
        except OSError as error:
            raise ConfigError(f"quarantine.directory: cannot use {self._directory}: {error.strerror}") from error
        self._bytes = sum(sizes)
        self._files = len(sizes)

    def keep(self, digest: str, value: bytes) -> bool:
        """Writes one file, durably; False when there is no room."""
        final = self._directory / f"{digest}{SUFFIX}"
        if final.exists():
            return True
        if self._files >= self._config.files_max or self._bytes + len(value) > self._config.bytes_max:
            return False
        staged = final.with_suffix(".tmp")
        try:
            with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            staged.rename(final)
            self._sync_directory()
        except OSError:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
            return False
        self._bytes += len(value)
        self._files += 1
        return True

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Quarantine:
    """Takes refusals: keeps, announces, declares.

    Args:
        config: limits.
        store: for the originals.
        notices: to Kafka.
        topic: of the notices.
        receipts: the bridge.
        telemetry: for events.
    """

    def __init__(
        self,
        config: QuarantineConfig,
        store: QuarantineStore,
        notices: NoticeWriter,
        topic: str,
        receipts: ReceiptSink,
        telemetry: Telemetry,
    ) -> None:
        self._remembered_max = config.remembered_max
        self._store = store
        self._notices = notices
        self._topic = topic
        self._receipts = receipts
        self._telemetry = telemetry
        self._known: OrderedDict[str, bool] = OrderedDict()
        self._announcing: dict[str, asyncio.Event] = {}
        self._writing = asyncio.Lock()

    async def take(self, refusal: Refusal) -> None:
        """Returns when the refusal is dealt with; the device's claim, if trusted, is settled then.

        Raises:
            Retryable: the way to Kafka was closed first; nothing is settled.
        """
        digest = hashlib.blake2b(
            refusal.payload, digest_size=16, person=b"quarantine", salt=_salt(refusal.device_id)
        ).hexdigest()
        while (announcing := self._announcing.get(digest)) is not None:
            await announcing.wait()
        kept = self._known.get(digest)
        if kept is None:
            kept = await self._announce(digest, refusal)
            self._remember(digest, kept)
        if refusal.claim is not None:
            claim = refusal.claim if kept else _as_dropped(refusal.claim)
            await self._receipts.write(ExportBatch.receipt(claim, GapReason.QUARANTINED))

    def _remember(self, digest: str, kept: bool) -> None:
        self._known[digest] = kept
        if len(self._known) > self._remembered_max:
            self._known.popitem(last=False)

    async def _announce(self, digest: str, refusal: Refusal) -> bool:
        done = self._announcing[digest] = asyncio.Event()
        try:
            return await self._keep_and_tell(digest, refusal)
        finally:
            del self._announcing[digest]
            done.set()

    async def _keep_and_tell(self, digest: str, refusal: Refusal) -> bool:
        """Returns whether the original is on disk."""
        reason = refusal.reason.value
        original = notice(refusal)
        original.original = refusal.payload
        original.detail = refusal.detail
        async with self._writing:
            kept = await asyncio.to_thread(self._store.keep, digest, original.SerializeToString())
        if not kept:
            self._telemetry.emit(NOT_KEPT, reason=reason, device=refusal.device_id, bytes=len(refusal.payload))
        self._telemetry.emit(QUARANTINED, reason=reason, device=refusal.device_id, file=digest if kept else "")
        headers: dict[str, str | bytes] = {"site": refusal.site, "device": refusal.device_id, "reason": reason}
        await self._notices.write(self._topic, refusal.device_id, notice(refusal).SerializeToString(), headers)
        return kept


def _as_dropped(claim: RecordBatch) -> RecordBatch:
    """The claim of an envelope of which nothing was kept."""
    lost = {GapReason.QUARANTINED: GapReason.DROPPED}
    gaps = (replace(gap, reason=lost.get(gap.reason, gap.reason)) for gap in claim.gaps)
    return replace(claim, gaps=merge_gaps(gaps))


def notice(refusal: Refusal) -> record_pb2.Quarantined:
    """What may be told outside the site. Only checked names and numbers: no byte of the original, no quoted text."""
    told = record_pb2.Quarantined(
        device_id=refusal.device_id,
        site=refusal.site,
        reason=refusal.reason.value,
        received_time_us=refusal.received_time_us,
        original_bytes=len(refusal.payload),
        origin=f"mqtt:{refusal.site}/{refusal.device_id}",
    )
    claim = refusal.claim
    if claim is not None:
        told.spool_id = claim.spool_id
        told.first_sequence = claim.first_sequence
        told.record_count = claim.record_count
        told.stream = claim.stream
    return told


def _salt(device_id: str) -> bytes:
    """The same bytes from two devices are two cases."""
    return hashlib.blake2b(device_id.encode(), digest_size=16).digest()
