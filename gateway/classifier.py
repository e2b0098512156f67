"""Policy and scanner together: a verdict for a batch. No I/O.

How it fails: closed. Whatever goes wrong while a batch is scanned, all of its records stay on the site.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from gateway.batches import Decision, Verdict
from gateway.detectors import UNSCANNED
from gateway.policy import UNSCANNED_RULE, BatchPolicy, Envelope, Policy, PolicyFile
from gateway.scanner import Scanner, ScannerConfig
from protos import record_pb2
from sluice.record import RecordBatch, Route
from sluice.telemetry import Event

SCAN_FAILED = Event(
    name="scan_failed",
    unit="batches",
    help="Batches kept on the site because scanning them failed.",
    labels=("error",),
    level="error",
)
KEEP_ALL = Verdict(Decision(Route.LOCAL, UNSCANNED_RULE, (UNSCANNED,)))


class Classifier:
    """Decides batches by one policy.

    Args:
        policy: the rules.
        scanner: what looks into the records.
        on_failure: told of an error while scanning; the batch stays on the site.
    """

    def __init__(
        self, policy: Policy, scanner: Scanner, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> None:
        self.policy = policy
        self.scanner = scanner
        self._on_failure = on_failure

    def classify(self, batch: RecordBatch) -> Verdict:
        """The decision for each present record of a canonical batch (`codec.decode`); never raises."""
        try:
            found = self.scanner.scan(batch.data)
            envelope = Envelope(batch.site, batch.device_id, batch.stream, batch.sensitivity)
            return _verdict(self.policy.for_envelope(envelope), batch, found)
        except Exception as error:  # noqa: BLE001 - in doubt a record is sensitive, whatever the doubt
            self._on_failure(error)
            return KEEP_ALL


def build(
    file: PolicyFile | None,
    scanner: ScannerConfig | None = None,
    on_failure: Callable[[Exception], None] = lambda _: None,
) -> Classifier:
    """A classifier from configuration.

    Args:
        file: the policy; None for the built-in one (defaults only).
        scanner: used where the policy file has no `[scanner]`.
        on_failure: see `Classifier`.

    Raises:
        ConfigError: naming rule, pattern or key.
    """
    file = file or PolicyFile()
    used = Scanner(file.scanner or scanner or ScannerConfig())
    return Classifier(Policy(file, used.names), used, on_failure)


def _verdict(policy: BatchPolicy, batch: RecordBatch, found: Mapping[int, frozenset[str]]) -> Verdict:
    default = policy.decide(dict, frozenset())
    by_labels = policy.needs_labels()
    if not found and not by_labels:
        return Verdict(default)
    frames = batch.frames()
    # Without a rule on labels only the records with findings are looked at.
    indices = range(len(frames)) if by_labels else sorted(found)
    decided = {i: policy.decide(lambda i=i: _labels(frames, i), found.get(i, frozenset())) for i in indices}  # type: ignore[misc]
    return Verdict(default, MappingProxyType({i: d for i, d in decided.items() if d != default}))


def _labels(frames: Sequence[bytes], index: int) -> Mapping[str, str]:
    return record_pb2.Record.FromString(frames[index]).labels
