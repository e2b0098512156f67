"""Payloads: whether a batch has any, and whether the scanner can read one. Pure.

A payload is readable when it is UTF-8 text and its content type does not say otherwise (image, archive...). One that
is not readable is *opaque*: it cannot be vouched for, so the default policy keeps it on the site.
"""

from functools import cache
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from protos import record_pb2

_PAYLOAD_TAG: Final = bytes([record_pb2.Record.PAYLOAD_FIELD_NUMBER << 3 | 2])
# An empty record in a batch: tag and length 0.
_EMPTY_RECORD_BYTES: Final = 2
_OPAQUE_TYPES: Final = ("image/", "audio/", "video/", "font/", "application/zip", "application/gzip", "application/pdf")
_PACKAGE: Final = "sluice.scan"


def has_payload(data: bytes) -> bool:
    """Whether any record of a serialised `RecordBatch` has a payload. No Python per record."""
    if _PAYLOAD_TAG not in data:
        return False
    view = _view().FromString(data)
    view.DiscardUnknownFields()
    return bool(view.ByteSize() > _EMPTY_RECORD_BYTES * len(view.records))


def is_opaque(frame: bytes) -> bool:
    """Whether a serialised record has a payload that the scanner cannot read."""
    if _PAYLOAD_TAG not in frame:
        return False
    record = record_pb2.Record.FromString(frame)
    if not record.payload:
        return False
    if record.content_type.lower().startswith(_OPAQUE_TYPES):
        return True
    try:
        record.payload.decode()
    except UnicodeDecodeError:
        return True
    # UTF-16 and most binary formats hold zero bytes, text does not.
    return b"\0" in record.payload


def payload_text(payload: bytes) -> str:
    """The payload as text, with replacement characters where it is none."""
    return payload.decode(errors="replace")


@cache
def _view() -> Any:
    """A message class that knows nothing of a record but its payload, so that C code drops the rest."""
    file = descriptor_pb2.FileDescriptorProto(name="sluice_scan_view.proto", package=_PACKAGE, syntax="proto3")
    record = file.message_type.add(name="Record")
    kinds = descriptor_pb2.FieldDescriptorProto
    record.field.add(
        name="payload",
        number=record_pb2.Record.PAYLOAD_FIELD_NUMBER,
        type=kinds.TYPE_BYTES,
        label=kinds.LABEL_OPTIONAL,
    )
    batch = file.message_type.add(name="Batch")
    batch.field.add(
        name="records",
        number=record_pb2.RecordBatch.RECORDS_FIELD_NUMBER,
        type=kinds.TYPE_MESSAGE,
        type_name=f".{_PACKAGE}.Record",
        label=kinds.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Batch"))
