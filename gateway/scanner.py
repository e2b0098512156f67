"""Finds personal data and secrets in a whole batch, at the speed of the batch's bytes.

One hyperscan pass goes over `RecordBatch.data`, which is exactly what would be exported: strings lie verbatim in
protobuf, so `text`, keys and values of `labels`, names of `metrics`, `payload` and `content_type` are covered. Where a
prefilter hits, the record that owns the bytes is parsed and each of its strings confirmed exactly (`detectors`), as
written and folded (`folding`). A clean batch costs no Python per record.

Not covered: numbers (the *values* of metrics, times; use a rule), the names of site, device and stream (whoever
configures a device chooses them, and the ledger needs them), text inside images or compressed payloads (found as
`opaque_payload`), a value cut in two by two fields or records.

Invariants:
  * No prefilter matches across byte 0x0A, the tag in front of every record, so each hit ends inside the record it
    belongs to; a confirmation never sees more than one field.
  * Bounded: `hits_max` hits and `timeout_s` seconds a batch. Records that were not settled within are `unscanned`, and
    the policy keeps them on the site.

How it fails: by an exception only for a programmer's error; the classifier turns any into "keep it".
"""

import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

from msgspec import Meta, field

from gateway.detectors import BY_NAME, DEFAULT_NAMES, OPAQUE_PAYLOAD, UNSCANNED, Detector
from gateway.folding import fold, fold_with_positions, trigger_expressions
from gateway.payloads import has_payload, is_opaque, payload_text
from gateway.user_patterns import UserPattern
from protos import record_pb2
from sluice.config import Section
from sluice.errors import ConfigError, Permanent
from sluice.record import NAME_PATTERN

if TYPE_CHECKING:
    import hyperscan

# Hits with this id ask for folding; detectors count from 0.
_FOLD: Final = 1_000_000


class ScannerConfig(Section, frozen=True, kw_only=True):
    """Which detectors run, and what they may cost."""

    detectors: Annotated[
        tuple[str, ...],
        Meta(description="Detectors that run. ipv4, ipv6 and mac are off by default: logs are full of them."),
    ] = DEFAULT_NAMES
    patterns: Annotated[
        dict[str, str],
        Meta(description="Further detectors: name = hyperscan expression over UTF-8 bytes; (?i) ignores case."),
    ] = field(default_factory=dict)
    allow: Annotated[
        tuple[str, ...],
        Meta(description="Values that are not personal, as globs without regard to case, such as '*@example.com'."),
    ] = ()
    timeout_s: Annotated[float, Meta(gt=0, description="Time for a batch; what is left then stays on the site.")] = 5.0
    hits_max: Annotated[int, Meta(ge=1, description="Hits looked at in a batch; beyond it the batch stays.")] = 250_000


class Finding(NamedTuple):
    """Something found in a text: its class, and where, in characters of the text as given."""

    type: str
    start: int
    end: int


class Scanner:
    """Finds the configured classes. Safe for several threads, one at a time.

    Args:
        config: what to look for.
        clock: monotonic seconds.

    Raises:
        ConfigError: an unknown detector, or a pattern that hyperscan refuses, with its reason.
    """

    def __init__(self, config: ScannerConfig | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config or ScannerConfig()
        self._clock = clock
        # Hyperscan's scratch memory serves one scan at a time.
        self._lock = threading.RLock()
        self._detectors: tuple[Detector, ...] = (
            *(_detector(name) for name in dict.fromkeys(self.config.detectors)),
            *(_user_detector(name, pattern) for name, pattern in self.config.patterns.items()),
        )
        self._allow = [re.compile(translate(glob.lower())) for glob in self.config.allow]
        self._users = frozenset(i for i, d in enumerate(self._detectors) if d.name not in BY_NAME)
        self._database = _compile(self._detectors, self._users)

    @property
    def names(self) -> frozenset[str]:
        """Every class that a scan can report."""
        return frozenset(d.name for d in self._detectors) | {OPAQUE_PAYLOAD, UNSCANNED}

    def scan(self, data: bytes) -> dict[int, frozenset[str]]:
        """Scans a serialised `RecordBatch`.

        Returns:
            The classes found, by index of the record in the batch; records in which nothing was found are absent.
        """
        with self._lock:
            return self._scan(data, self._clock() + self.config.timeout_s)

    def _scan(self, data: bytes, deadline: float) -> dict[int, frozenset[str]]:
        hits = self._hits(data)
        payloads = has_payload(data)
        if not hits and not payloads:
            return {}
        frames = record_pb2.RecordFrames.FromString(data).records
        if len(hits) > self.config.hits_max:
            return dict.fromkeys(range(len(frames)), frozenset({UNSCANNED}))
        found = dict(_opaque(frames)) if payloads else {}
        for index, ids in _owners(hits, frames, len(data)).items():
            late = self._clock() > deadline
            classes = frozenset({UNSCANNED}) if late else self._confirm(frames[index], ids)
            if classes:
                found[index] = found.get(index, frozenset()) | classes
        return found

    def find(self, text: str) -> list[Finding]:
        """Everything found in one text, by position; spans of the same class do not overlap."""
        with self._lock:
            findings = [*self._find_in(text)]
            folded, positions = fold_with_positions(text)
            if folded != text:
                findings += [Finding(f.type, *_original(positions, f.start, f.end)) for f in self._find_in(folded)]
        return _without_overlaps(findings)

    def _hits(self, data: bytes) -> list[tuple[int, int]]:
        """`(id, end)` of every prefilter match; one more than `hits_max` when there are too many."""
        import hyperscan

        hits: list[tuple[int, int]] = []
        limit = self.config.hits_max
        last: dict[int, int] = {}

        def on_match(ident: int, _start: int, end: int, _flags: int, _context: object) -> bool:
            # A longer match of the same run adds nothing: no built-in matches a record's tag, so it is the same record.
            if last.get(ident) != end - 1 or ident in self._users:
                hits.append((ident, end))
            last[ident] = end
            return len(hits) > limit

        try:
            self._database.scan(data, match_event_handler=on_match)
        except hyperscan.ScanTerminated:
            assert len(hits) > limit, "only the limit ends a scan early"
        return hits

    def _confirm(self, frame: bytes, ids: set[int]) -> frozenset[str]:
        found: set[str] = set()
        for text in strings_of(record_pb2.Record.FromString(frame)):
            wanted = [self._detectors[i] for i in ids if i != _FOLD and self._detectors[i].name not in found]
            found.update(d.name for d in wanted if self._first(d, text))
            if _FOLD in ids:
                found.update(self._found_folded(text, found))
        return frozenset(found)

    def _found_folded(self, text: str, known: set[str]) -> Iterator[str]:
        folded = fold(text)
        if folded == text:
            return
        for ident in {ident for ident, _ in self._hits(folded.encode(errors="replace"))} - {_FOLD}:
            detector = self._detectors[ident]
            if detector.name not in known and self._first(detector, folded):
                yield detector.name

    def _first(self, detector: Detector, text: str) -> bool:
        return any(self._counts(text[start:end]) for start, end in detector.confirm(text))

    def _find_in(self, text: str) -> Iterator[Finding]:
        ids = {ident for ident, _ in self._hits(text.encode(errors="replace"))} - {_FOLD}
        for ident in ids:
            detector = self._detectors[ident]
            for start, end in detector.confirm(text):
                if self._counts(text[start:end]):
                    yield Finding(detector.name, start, end)

    def _counts(self, value: str) -> bool:
        return not any(pattern.match(value.lower()) for pattern in self._allow)


def strings_of(record: record_pb2.Record) -> Iterator[str]:
    """Every string of a record: text, names and values of labels, names of metrics, content type, payload."""
    if record.text:
        yield record.text
    yield from record.metrics
    for key, value in record.labels.items():
        yield key
        yield value
    if record.content_type:
        yield record.content_type
    if record.payload:
        yield payload_text(record.payload)


def _detector(name: str) -> Detector:
    if name not in BY_NAME:
        raise ConfigError(f"scanner.detectors: unknown detector {name!r}; known are {', '.join(BY_NAME)}")
    return BY_NAME[name]


def _user_detector(name: str, expression: str) -> Detector:
    if name in BY_NAME or name in {OPAQUE_PAYLOAD, UNSCANNED, "*", "none"} or not NAME_PATTERN.match(name):
        raise ConfigError(f"scanner.patterns.{name}: not a free name of letters, digits, . _ -")
    pattern = UserPattern(name, expression)
    return Detector(name, (pattern.prefilter,), pattern.find)


def _compile(detectors: Sequence[Detector], users: frozenset[int]) -> "hyperscan.Database":
    import hyperscan

    caseless = hyperscan.HS_FLAG_CASELESS
    # Patterns of users say (?i) themselves.
    pairs = [(e, i, 0 if i in users else caseless) for i, d in enumerate(detectors) for e in d.prefilters]
    pairs += [(expression, _FOLD, 0) for expression in trigger_expressions()]
    database = hyperscan.loadb(_compiled(tuple(pairs)), hyperscan.HS_MODE_BLOCK)
    # A database that was loaded brings no scratch memory.
    database.scratch = hyperscan.Scratch(database)
    return database


@lru_cache(maxsize=4)
def _compiled(pairs: tuple[tuple[bytes, int, int], ...]) -> bytes:
    """A serialised database. Compiling takes up to a second; a reloaded policy mostly has the same patterns."""
    import hyperscan

    expressions, ids, flags = zip(*pairs, strict=True)
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    try:
        database.compile(expressions=list(expressions), ids=list(ids), elements=len(ids), flags=list(flags))
    except hyperscan.error as error:
        raise ConfigError(f"scanner: the patterns do not compile together: {error}") from error
    return bytes(hyperscan.dumpb(database))


def _owners(hits: Sequence[tuple[int, int]], frames: Sequence[bytes], total: int) -> dict[int, set[int]]:
    """The hits of each record, by the record whose bytes hold the hit's last one."""
    if not hits:
        return {}
    # Tag and length stand before each record; a length takes 7 bits a byte.
    stops = list(accumulate(1 + (max(size, 1).bit_length() + 6) // 7 + size for size in map(len, frames)))
    if stops[-1] != total:
        # Attribution would be guesswork; the classifier keeps such a batch.
        raise Permanent("the batch is not in canonical form")
    owners: dict[int, set[int]] = {}
    for ident, end in hits:
        owners.setdefault(bisect_right(stops, end - 1), set()).add(ident)
    return owners


def _opaque(frames: Sequence[bytes]) -> Iterator[tuple[int, frozenset[str]]]:
    for index, frame in enumerate(frames):
        if is_opaque(frame):
            yield index, frozenset({OPAQUE_PAYLOAD})


def _original(positions: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """A span of folded text in the text as given."""
    stop = positions[end]
    # Behind the last character's own position, before invisible ones that follow it.
    first_behind = next((p for p in positions[end - 1 :] if p > positions[end - 1]), stop)
    return positions[start], min(stop, first_behind)


def _without_overlaps(findings: Sequence[Finding]) -> list[Finding]:
    """Sorted by position; of overlapping spans of one class the first and longest stays."""
    stops: dict[str, int] = {}
    kept: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start, -f.end, f.type)):
        if finding.start >= stops.get(finding.type, 0):
            stops[finding.type] = finding.end
            kept.append(finding)
    return kept


def scan_summary(found: Mapping[int, frozenset[str]]) -> dict[str, int]:
    """How many records hold each class."""
    counts: dict[str, int] = {}
    for classes in found.values():
        for name in classes:
            counts[name] = counts.get(name, 0) + 1
    return counts
