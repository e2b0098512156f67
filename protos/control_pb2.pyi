from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequenceRange(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("spool_id", "cumulative_sequence", "ranges", "checksum")
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    CUMULATIVE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    spool_id: bytes
    cumulative_sequence: int
    ranges: _containers.RepeatedCompositeFieldContainer[SequenceRange]
    checksum: int
    def __init__(self, spool_id: _Optional[bytes] = ..., cumulative_sequence: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[SequenceRange, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("device_id", "site", "spool_id", "next_sequence", "spool_records", "spool_bytes", "spool_oldest_time_us", "agent_version", "uptime_s", "status_time_us", "online", "expired_records", "received_time_us", "spool_ranges")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SPOOL_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SPOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPOOL_OLDEST_TIME_US_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    STATUS_TIME_US_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TIME_US_FIELD_NUMBER: _ClassVar[int]
    SPOOL_RANGES_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    site: str
    spool_id: bytes
    next_sequence: int
    spool_records: int
    spool_bytes: int
    spool_oldest_time_us: int
    agent_version: str
    uptime_s: float
    status_time_us: int
    online: bool
    expired_records: int
    received_time_us: int
    spool_ranges: _containers.RepeatedCompositeFieldContainer[SequenceRange]
    def __init__(self, device_id: _Optional[str] = ..., site: _Optional[str] = ..., spool_id: _Optional[bytes] = ..., next_sequence: _Optional[int] = ..., spool_records: _Optional[int] = ..., spool_bytes: _Optional[int] = ..., spool_oldest_time_us: _Optional[int] = ..., agent_version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., status_time_us: _Optional[int] = ..., online: _Optional[bool] = ..., expired_records: _Optional[int] = ..., received_time_us: _Optional[int] = ..., spool_ranges: _Optional[_Iterable[_Union[SequenceRange, _Mapping]]] = ...) -> None: ...
