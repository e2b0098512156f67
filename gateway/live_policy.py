"""The policy in force: follows its file without a restart.

An invalid new file keeps the old policy and says so, once per version of the file; a missing one likewise. The switch
is one assignment: a batch is decided by one policy or the other, never by both.
"""

import asyncio
from pathlib import Path

from gateway.batches import Verdict
from gateway.classifier import SCAN_FAILED, Classifier, build
from gateway.policy import PolicyConfig, PolicyFile, configured, read
from gateway.scanner import ScannerConfig
from sluice.errors import SluiceError
from sluice.record import RecordBatch
from sluice.telemetry import Event, Telemetry

LOADED = Event(name="policy_loaded", unit="policies", help="Policies that came into force.")
REFUSED = Event(
    name="policy_refused",
    unit="policies",
    help="Policy files that could not be read or are invalid; the old policy stays in force.",
    level="error",
)


class LivePolicy:
    """A service (`sluice.service`) that classifies by the newest valid policy.

    Args:
        config: the file, and how often to look.
        scanner: used where the policy file has no `[scanner]`.
        telemetry: for its events.

    Raises:
        ConfigError: when the file is invalid at the start: there is no older policy to keep.
    """

    def __init__(self, config: PolicyConfig, scanner: ScannerConfig, telemetry: Telemetry) -> None:
        self._config = config
        self._scanner = scanner
        self._telemetry = telemetry
        self._path = Path(config.file) if config.file else None
        self._stopping = asyncio.Event()
        self._seen = _version(self._path)
        self._file = configured(config) or PolicyFile()
        self._classifier = self._build(self._file)
        telemetry.emit(LOADED, rules=len(self._file.rules), file=str(self._path or "built-in"))

    @property
    def name(self) -> str:
        """See `Service`."""
        return "policy"

    @property
    def classifier(self) -> Classifier:
        """The one in force now."""
        return self._classifier

    def classify(self, batch: RecordBatch) -> Verdict:
        """See `Classifier.classify`. Thread-safe."""
        return self._classifier.classify(batch)

    async def run(self) -> None:
        """Looks at the file until drained."""
        while not self._stopping.is_set():
            try:
                async with asyncio.timeout(self._config.reload_interval_s):
                    await self._stopping.wait()
            except TimeoutError:
                await self.reload()

    async def drain(self, deadline_s: float) -> None:
        """Stops looking."""
        self._stopping.set()

    async def reload(self) -> bool:
        """Takes over a changed file. Returns whether another policy came into force."""
        version = await asyncio.to_thread(_version, self._path)
        if self._path is None or version == self._seen:
            return False
        self._seen = version
        try:
            file = await asyncio.to_thread(read, self._path)
            classifier = await asyncio.to_thread(self._build, file)
        except SluiceError as error:
            self._telemetry.emit(REFUSED, detail=str(error), file=str(self._path))
            return False
        changes = _changes(self._file, file)
        self._file, self._classifier = file, classifier
        self._telemetry.emit(LOADED, rules=len(file.rules), file=str(self._path), changes=changes)
        return True

    def _build(self, file: PolicyFile) -> Classifier:
        return build(file, self._scanner, self._failed)

    def _failed(self, error: Exception) -> None:
        # The kind only: a message may quote what was scanned.
        self._telemetry.emit(SCAN_FAILED, error=type(error).__name__)


_Version = tuple[int, int, int] | None


def _version(path: Path | None) -> _Version:
    """What tells one version of the file from the next; None when there is none."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None


def _changes(old: PolicyFile, new: PolicyFile) -> dict[str, object]:
    before, after = {r.name: r for r in old.rules}, {r.name: r for r in new.rules}
    return {
        "rules_added": sorted(after.keys() - before.keys()),
        "rules_removed": sorted(before.keys() - after.keys()),
        "rules_changed": sorted(n for n in before.keys() & after.keys() if before[n] != after[n]),
        "order_changed": [n for n in before if n in after] != [n for n in after if n in before],
        "defaults_changed": old.defaults != new.defaults,
        "scanner_changed": old.scanner != new.scanner,
    }
