"""What the lake says of itself."""

from sluice.telemetry import Event

COMMITTED = Event(name="lake_committed", unit="rows", help="Rows and gaps committed to the lake.", labels=("reason",))
COMMIT_FAILED = Event(
    name="lake_commit_failed",
    unit="commits",
    help="Flushes that failed and are tried again; nothing is lost meanwhile.",
    level="error",
)
FENCED = Event(
    name="lake_fenced",
    unit="batches",
    help="Batches dropped and read again, because a partition has another owner or an answer was lost.",
    level="warning",
)
DUPLICATES_REFUSED = Event(
    name="lake_duplicates_refused",
    unit="rows",
    help="Rows and gaps refused because their position had met its fate before.",
    labels=("table",),
    level="debug",
)
QUARANTINED = Event(
    name="lake_quarantined",
    unit="messages",
    help="Messages that could not be processed and are kept in the quarantine table.",
    labels=("topic", "reason"),
    level="warning",
)
ASSIGNED = Event(name="lake_assigned", unit="partitions", help="Partitions taken over, read from the table's version.")
REVOKED = Event(name="lake_revoked", unit="partitions", help="Partitions handed over.")
KAFKA_ERROR = Event(
    name="lake_kafka_errors",
    unit="errors",
    help="Errors of the Kafka client; it goes on trying.",
    labels=("code",),
    level="warning",
)
OFFSETS_REGRESSED = Event(
    name="lake_offsets_regressed",
    unit="partitions",
    help="Partitions whose offsets in Kafka do not fit those in the lake: a topic made anew, or data past retention.",
    level="error",
)
