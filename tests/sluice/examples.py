"""Records, batches and hypothesis strategies that the kernel's tests share."""

from hypothesis import strategies as st

from sluice.record import Gap, GapReason, Record, RecordBatch, Sensitivity, join_frames, merge_gaps

SPOOL = bytes(range(16))


def serialised(*records: Record) -> bytes:
    return join_frames([record.to_message().SerializeToString() for record in records])


def batch_of(
    *records: Record, first: int = 0, gaps: tuple[Gap, ...] = (), spool_id: bytes = SPOOL, **fields: object
) -> RecordBatch:
    """A batch of these records; the gaps' positions are added to the range."""
    defaults = {"device_id": "device-1", "stream": "host", "site": "site-1", "sensitivity": Sensitivity.INTERNAL}
    return RecordBatch(
        spool_id=spool_id,
        first_sequence=first,
        record_count=len(records) + sum(gap.count for gap in gaps),
        data=serialised(*records),
        gaps=gaps,
        **(defaults | fields),  # type: ignore[arg-type]
    )


def texts(*values: str) -> list[Record]:
    return [Record(event_time_us=number, text=value) for number, value in enumerate(values)]


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
words = st.text(st.characters(codec="utf-8"), max_size=30)
records = st.builds(
    Record,
    event_time_us=st.integers(-(2**63), 2**63 - 1),
    text=words,
    metrics=st.dictionaries(words, st.floats(allow_nan=False), max_size=4),
    labels=st.dictionaries(words, words, max_size=4),
    payload=st.binary(max_size=40),
    content_type=words,
)
reasons = st.sampled_from([reason for reason in GapReason if reason is not GapReason.UNSPECIFIED])


@st.composite
def batches(draw: st.DrawFn) -> RecordBatch:
    """A batch in which each position is a record or lies in a gap."""
    first = draw(st.integers(0, 2**62))
    positions = draw(st.lists(st.one_of(records, reasons), min_size=1, max_size=12))
    gaps = [Gap(first + i, 1, p) for i, p in enumerate(positions) if isinstance(p, GapReason)]
    return RecordBatch(
        device_id=draw(names),
        spool_id=draw(st.binary(min_size=16, max_size=16)),
        first_sequence=first,
        record_count=len(positions),
        stream=draw(names),
        site=draw(names),
        data=serialised(*(p for p in positions if isinstance(p, Record))),
        sensitivity=draw(st.sampled_from(Sensitivity)),
        gaps=merge_gaps(gaps),
        received_time_us=draw(st.integers(0, 2**62)),
    )
