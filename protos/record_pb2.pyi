from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sensitivity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SENSITIVITY_UNSPECIFIED: _ClassVar[Sensitivity]
    SENSITIVITY_PUBLIC: _ClassVar[Sensitivity]
    SENSITIVITY_INTERNAL: _ClassVar[Sensitivity]
    SENSITIVITY_SENSITIVE: _ClassVar[Sensitivity]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]

class GapReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GAP_REASON_UNSPECIFIED: _ClassVar[GapReason]
    GAP_REASON_WITHHELD: _ClassVar[GapReason]
    GAP_REASON_EXPIRED: _ClassVar[GapReason]
    GAP_REASON_QUARANTINED: _ClassVar[GapReason]
    GAP_REASON_DROPPED: _ClassVar[GapReason]
SENSITIVITY_UNSPECIFIED: Sensitivity
SENSITIVITY_PUBLIC: Sensitivity
SENSITIVITY_INTERNAL: Sensitivity
SENSITIVITY_SENSITIVE: Sensitivity
COMPRESSION_NONE: Compression
COMPRESSION_ZSTD: Compression
GAP_REASON_UNSPECIFIED: GapReason
GAP_REASON_WITHHELD: GapReason
GAP_REASON_EXPIRED: GapReason
GAP_REASON_QUARANTINED: GapReason
GAP_REASON_DROPPED: GapReason

class Record(_message.Message):
    __slots__ = ("event_time_us", "text", "metrics", "labels", "payload", "content_type")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EVENT_TIME_US_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    event_time_us: int
    text: str
    metrics: _containers.ScalarMap[str, float]
    labels: _containers.ScalarMap[str, str]
    payload: bytes
    content_type: str
    def __init__(self, event_time_us: _Optional[int] = ..., text: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., labels: _Optional[_Mapping[str, str]] = ..., payload: _Optional[bytes] = ..., content_type: _Optional[str] = ...) -> None: ...

class RecordBatch(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class RecordFrames(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, records: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("first_sequence", "count", "reason")
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    first_sequence: int
    count: int
    reason: GapReason
    def __init__(self, first_sequence: _Optional[int] = ..., count: _Optional[int] = ..., reason: _Optional[_Union[GapReason, str]] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("device_id", "spool_id", "first_sequence", "record_count", "stream", "site", "sensitivity", "compression", "batch", "checksum", "gaps", "traceparent", "tracestate", "received_time_us", "header_checksum")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECORD_COUNT_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TIME_US_FIELD_NUMBER: _ClassVar[int]
    HEADER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    spool_id: bytes
    first_sequence: int
    record_count: int
    stream: str
    site: str
    sensitivity: Sensitivity
    compression: Compression
    batch: bytes
    checksum: int
    gaps: _containers.RepeatedCompositeFieldContainer[Gap]
    traceparent: str
    tracestate: str
    received_time_us: int
    header_checksum: int
    def __init__(self, device_id: _Optional[str] = ..., spool_id: _Optional[bytes] = ..., first_sequence: _Optional[int] = ..., record_count: _Optional[int] = ..., stream: _Optional[str] = ..., site: _Optional[str] = ..., sensitivity: _Optional[_Union[Sensitivity, str]] = ..., compression: _Optional[_Union[Compression, str]] = ..., batch: _Optional[bytes] = ..., checksum: _Optional[int] = ..., gaps: _Optional[_Iterable[_Union[Gap, _Mapping]]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., received_time_us: _Optional[int] = ..., header_checksum: _Optional[int] = ...) -> None: ...

class Quarantined(_message.Message):
    __slots__ = ("device_id", "spool_id", "first_sequence", "record_count", "stream", "site", "reason", "detail", "received_time_us", "original", "original_bytes", "origin")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECORD_COUNT_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TIME_US_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    spool_id: bytes
    first_sequence: int
    record_count: int
    stream: str
    site: str
    reason: str
    detail: str
    received_time_us: int
    original: bytes
    original_bytes: int
    origin: str
    def __init__(self, device_id: _Optional[str] = ..., spool_id: _Optional[bytes] = ..., first_sequence: _Optional[int] = ..., record_count: _Optional[int] = ..., stream: _Optional[str] = ..., site: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., received_time_us: _Optional[int] = ..., original: _Optional[bytes] = ..., original_bytes: _Optional[int] = ..., origin: _Optional[str] = ...) -> None: ...
