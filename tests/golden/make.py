"""Made the files of `tests/golden/v0.1`: `python -m tests.golden.make FOLDER`. Released bytes are never made again.

A file that has been released stays as it is for ever, since logs, spools and lakes hold such bytes. When a release adds
fields, a new folder with its version joins the old ones.
"""

import sys
from pathlib import Path

from protos import control_pb2, feed_pb2, record_pb2
from sluice.acks import decode_ack, encode_ack
from sluice.codec import Compression, encode
from sluice.record import Gap, GapReason, Record, RecordBatch, Sensitivity, join_frames

SPOOL = bytes(range(16))
TIME_US = 1_750_000_000_000_000
RECORDS = (
    Record(TIME_US, text="kernel: eth0 link up: ä 你好", labels={"host": "edge-01", "unit": "kernel"}),
    Record(TIME_US + 1, metrics={"cpu.load_1m": 0.25, "memory.used_bytes": 2.0**40}, labels={"host": "edge-01"}),
    Record(-1, payload=bytes(range(256)), content_type="application/octet-stream"),
)
GAPS = (Gap(1001, 2, GapReason.WITHHELD), Gap(1004, 1, GapReason.EXPIRED), Gap(1006, 3, GapReason.QUARANTINED))


def batch() -> RecordBatch:
    """Records at 1000, 1003 and 1005; every reason but DROPPED."""
    return RecordBatch(
        device_id="edge-01",
        spool_id=SPOOL,
        first_sequence=1000,
        record_count=9,
        stream="syslog",
        site="plant.a",
        data=join_frames([record.to_message().SerializeToString(deterministic=True) for record in RECORDS]),
        sensitivity=Sensitivity.INTERNAL,
        gaps=GAPS,
        received_time_us=TIME_US + 5_000_000,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        tracestate="vendor=a1",
    )


def ack() -> control_pb2.Ack:
    return decode_ack(encode_ack(SPOOL, 1000, [(1005, 1010), (1020, 1021)]))


def status() -> control_pb2.Status:
    return control_pb2.Status(
        device_id="edge-01",
        site="plant.a",
        spool_id=SPOOL,
        next_sequence=2**40,
        spool_records=17,
        spool_bytes=4096,
        spool_oldest_time_us=TIME_US,
        agent_version="0.1.0",
        uptime_s=12.5,
        status_time_us=TIME_US + 1,
        online=True,
        expired_records=3,
        received_time_us=TIME_US + 2,
        spool_ranges=[control_pb2.SequenceRange(first=1000, last=1016)],
    )


def results() -> feed_pb2.ResultBatch:
    result = feed_pb2.Result(
        sequence=1000,
        event_time_us=TIME_US,
        label="network",
        score=0.75,
        novelty=0.5,
        embedding=bytes(range(32)),
        token_count=9,
        truncated=True,
    )
    return feed_pb2.ResultBatch(
        device_id="edge-01",
        spool_id=SPOOL,
        site="plant.a",
        stream="syslog",
        origin=feed_pb2.ORIGIN_SITE,
        task="classify",
        model="all-MiniLM-L6-v2",
        model_version="1",
        created_time_us=TIME_US + 3,
        results=[result],
    )


def quarantined() -> record_pb2.Quarantined:
    return record_pb2.Quarantined(
        device_id="edge-01",
        spool_id=SPOOL,
        first_sequence=1000,
        record_count=9,
        stream="syslog",
        site="plant.a",
        reason="checksum",
        detail="crc32c differs",
        received_time_us=TIME_US,
        original=b"\xff\x00",
        original_bytes=2,
        origin="sluice/v1/plant.a/edge-01/up",
    )


def files() -> dict[str, bytes]:
    """Each file's content by its name."""
    return {
        "envelope.none.bin": encode(batch(), Compression.NONE).payload,
        "envelope.zstd.bin": encode(batch(), Compression.ZSTD).payload,
        "envelope.receipt.bin": encode(batch().receipt(GapReason.DROPPED)).payload,
        "ack.bin": ack().SerializeToString(),
        "status.bin": status().SerializeToString(),
        "results.bin": results().SerializeToString(),
        "quarantined.bin": quarantined().SerializeToString(),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)  # fails when it is there: released bytes stay
    for name, content in files().items():
        (folder / name).write_bytes(content)
