"""Bytes of every released version decode for ever, to what they meant when they were written."""

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message

from protos import control_pb2, feed_pb2, record_pb2
from sluice.codec import Limits, decode
from sluice.record import GapReason, Record
from tests.golden import make

V0_1 = Path(__file__).parent / "v0.1"


@pytest.mark.parametrize("name", ["envelope.none.bin", "envelope.zstd.bin"])
def test_envelopes_of_0_1(name: str) -> None:
    batch = decode((V0_1 / name).read_bytes(), Limits())
    assert tuple(Record.from_message(message) for message in batch.messages()) == make.RECORDS
    assert list(batch.sequences()) == [1000, 1003, 1005]
    assert batch == make.batch()


def test_receipts_of_0_1() -> None:
    receipt = decode((V0_1 / "envelope.receipt.bin").read_bytes(), Limits())
    assert receipt == make.batch().receipt(GapReason.DROPPED)
    assert receipt.present_count == 0


@pytest.mark.parametrize(
    ("name", "kind", "meant"),
    [
        ("ack.bin", control_pb2.Ack, make.ack),
        ("status.bin", control_pb2.Status, make.status),
        ("results.bin", feed_pb2.ResultBatch, make.results),
        ("quarantined.bin", record_pb2.Quarantined, make.quarantined),
    ],
)
def test_messages_of_0_1(name: str, kind: type[Message], meant: Callable[[], Message]) -> None:
    content = (V0_1 / name).read_bytes()
    message = kind.FromString(content)
    assert message == meant()
    message.DiscardUnknownFields()
    assert message.SerializeToString() == content, "a field is no longer known"


def test_no_released_file_is_left_untested() -> None:
    assert {file.name for file in V0_1.iterdir()} == set(make.files())
