"""The application acknowledgement on the wire (`protos/control.proto`): what may leave the spool.

It deletes, so it carries its own checksum: a flipped bit must not widen it.
"""

import struct
from collections.abc import Iterable

import google_crc32c
from google.protobuf.message import DecodeError

from protos import control_pb2
from sluice.codec import Rejected, RejectReason


def ack_checksum(ack: control_pb2.Ack) -> int:
    """The crc32c of an acknowledgement, as `protos/control.proto` defines it."""
    bounds = [bound for run in ack.ranges for bound in (run.first, run.last)]
    packed = struct.pack(f"<Q{len(bounds)}Q", ack.cumulative_sequence, *bounds)
    return int(google_crc32c.value(ack.spool_id + packed))


def encode_ack(spool_id: bytes, cumulative_sequence: int, ranges: Iterable[tuple[int, int]]) -> bytes:
    """Serialises an acknowledgement.

    Args:
        spool_id: whose.
        cumulative_sequence: all sequences below it are settled; 0 when unknown.
        ranges: settled besides, as runs `[start, stop)`.
    """
    ack = control_pb2.Ack(
        spool_id=spool_id,
        cumulative_sequence=cumulative_sequence,
        ranges=[control_pb2.SequenceRange(first=start, last=stop - 1) for start, stop in ranges],
    )
    ack.checksum = ack_checksum(ack)
    return ack.SerializeToString()


def decode_ack(payload: bytes) -> control_pb2.Ack:
    """Parses and verifies an acknowledgement.

    Raises:
        Rejected: undecodable, or damaged.
    """
    try:
        ack = control_pb2.Ack.FromString(payload)
    except DecodeError as error:
        raise Rejected(RejectReason.UNDECODABLE, f"acknowledgement: {error}") from error
    if ack_checksum(ack) != ack.checksum:
        raise Rejected(RejectReason.CHECKSUM, "crc32c of the acknowledgement differs from its own")
    return ack
