from protos import record_pb2 as _record_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_RECORDS: _ClassVar[Kind]
    KIND_RESULTS: _ClassVar[Kind]

class Origin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORIGIN_CLOUD: _ClassVar[Origin]
    ORIGIN_SITE: _ClassVar[Origin]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_ONLINE: _ClassVar[Priority]
    PRIORITY_BACKGROUND: _ClassVar[Priority]
KIND_UNSPECIFIED: Kind
KIND_RECORDS: Kind
KIND_RESULTS: Kind
ORIGIN_CLOUD: Origin
ORIGIN_SITE: Origin
PRIORITY_ONLINE: Priority
PRIORITY_BACKGROUND: Priority

class Result(_message.Message):
    __slots__ = ("sequence", "event_time_us", "label", "score", "novelty", "embedding", "token_count", "truncated", "spans")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_US_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NOVELTY_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    event_time_us: int
    label: str
    score: float
    novelty: float
    embedding: bytes
    token_count: int
    truncated: bool
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    def __init__(self, sequence: _Optional[int] = ..., event_time_us: _Optional[int] = ..., label: _Optional[str] = ..., score: _Optional[float] = ..., novelty: _Optional[float] = ..., embedding: _Optional[bytes] = ..., token_count: _Optional[int] = ..., truncated: _Optional[bool] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("start", "end", "label", "score")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    label: str
    score: float
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., label: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class ResultBatch(_message.Message):
    __slots__ = ("device_id", "spool_id", "site", "stream", "origin", "task", "model", "model_version", "created_time_us", "results")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_TIME_US_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    spool_id: bytes
    site: str
    stream: str
    origin: Origin
    task: str
    model: str
    model_version: str
    created_time_us: int
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, device_id: _Optional[str] = ..., spool_id: _Optional[bytes] = ..., site: _Optional[str] = ..., stream: _Optional[str] = ..., origin: _Optional[_Union[Origin, str]] = ..., task: _Optional[str] = ..., model: _Optional[str] = ..., model_version: _Optional[str] = ..., created_time_us: _Optional[int] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("kinds", "sites", "devices", "streams", "labels", "score_min")
    KINDS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORE_MIN_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.RepeatedScalarFieldContainer[Kind]
    sites: _containers.RepeatedScalarFieldContainer[str]
    devices: _containers.RepeatedScalarFieldContainer[str]
    streams: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.RepeatedScalarFieldContainer[str]
    score_min: float
    def __init__(self, kinds: _Optional[_Iterable[_Union[Kind, str]]] = ..., sites: _Optional[_Iterable[str]] = ..., devices: _Optional[_Iterable[str]] = ..., streams: _Optional[_Iterable[str]] = ..., labels: _Optional[_Iterable[str]] = ..., score_min: _Optional[float] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("latest", "earliest", "time_us", "resume_token")
    LATEST_FIELD_NUMBER: _ClassVar[int]
    EARLIEST_FIELD_NUMBER: _ClassVar[int]
    TIME_US_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    latest: bool
    earliest: bool
    time_us: int
    resume_token: bytes
    def __init__(self, latest: _Optional[bool] = ..., earliest: _Optional[bool] = ..., time_us: _Optional[int] = ..., resume_token: _Optional[bytes] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("filter", "start")
    FILTER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    filter: Filter
    start: Start
    def __init__(self, filter: _Optional[_Union[Filter, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ...) -> None: ...

class FeedRecord(_message.Message):
    __slots__ = ("sequence", "record")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    record: _record_pb2.Record
    def __init__(self, sequence: _Optional[int] = ..., record: _Optional[_Union[_record_pb2.Record, _Mapping]] = ...) -> None: ...

class FeedRecords(_message.Message):
    __slots__ = ("device_id", "spool_id", "site", "stream", "received_time_us", "records")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    SPOOL_ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TIME_US_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    spool_id: bytes
    site: str
    stream: str
    received_time_us: int
    records: _containers.RepeatedCompositeFieldContainer[FeedRecord]
    def __init__(self, device_id: _Optional[str] = ..., spool_id: _Optional[bytes] = ..., site: _Optional[str] = ..., stream: _Optional[str] = ..., received_time_us: _Optional[int] = ..., records: _Optional[_Iterable[_Union[FeedRecord, _Mapping]]] = ...) -> None: ...

class FeedBatch(_message.Message):
    __slots__ = ("records", "results", "heartbeat", "drain", "resume_token")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    records: FeedRecords
    results: ResultBatch
    heartbeat: Heartbeat
    drain: Drain
    resume_token: bytes
    def __init__(self, records: _Optional[_Union[FeedRecords, _Mapping]] = ..., results: _Optional[_Union[ResultBatch, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., resume_token: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("server_time_us",)
    SERVER_TIME_US_FIELD_NUMBER: _ClassVar[int]
    server_time_us: int
    def __init__(self, server_time_us: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class AnalyzeRequest(_message.Message):
    __slots__ = ("request_id", "text", "task", "priority", "deadline_ms", "want_embedding", "stream", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    WANT_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    task: str
    priority: Priority
    deadline_ms: int
    want_embedding: bool
    stream: str
    model: str
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., task: _Optional[str] = ..., priority: _Optional[_Union[Priority, str]] = ..., deadline_ms: _Optional[int] = ..., want_embedding: _Optional[bool] = ..., stream: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class AnalyzeResponse(_message.Message):
    __slots__ = ("request_id", "result", "model", "model_version", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    result: Result
    model: str
    model_version: str
    error: AnalyzeError
    def __init__(self, request_id: _Optional[str] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., model: _Optional[str] = ..., model_version: _Optional[str] = ..., error: _Optional[_Union[AnalyzeError, _Mapping]] = ...) -> None: ...

class AnalyzeError(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[AnalyzeError.Code]
        CODE_INVALID: _ClassVar[AnalyzeError.Code]
        CODE_OVERLOADED: _ClassVar[AnalyzeError.Code]
        CODE_DEADLINE_EXCEEDED: _ClassVar[AnalyzeError.Code]
        CODE_INTERNAL: _ClassVar[AnalyzeError.Code]
    CODE_UNSPECIFIED: AnalyzeError.Code
    CODE_INVALID: AnalyzeError.Code
    CODE_OVERLOADED: AnalyzeError.Code
    CODE_DEADLINE_EXCEEDED: AnalyzeError.Code
    CODE_INTERNAL: AnalyzeError.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: AnalyzeError.Code
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[_Union[AnalyzeError.Code, str]] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "images", "chat", "max_new_tokens", "temperature", "stop", "priority", "deadline_ms")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    images: _containers.RepeatedScalarFieldContainer[bytes]
    chat: bool
    max_new_tokens: int
    temperature: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    priority: Priority
    deadline_ms: int
    def __init__(self, prompt: _Optional[str] = ..., images: _Optional[_Iterable[bytes]] = ..., chat: _Optional[bool] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "end")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    text: str
    end: GenerateEnd
    def __init__(self, text: _Optional[str] = ..., end: _Optional[_Union[GenerateEnd, _Mapping]] = ...) -> None: ...

class GenerateEnd(_message.Message):
    __slots__ = ("finish", "prompt_tokens", "new_tokens", "model", "model_version")
    class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FINISH_UNSPECIFIED: _ClassVar[GenerateEnd.Finish]
        FINISH_END: _ClassVar[GenerateEnd.Finish]
        FINISH_LENGTH: _ClassVar[GenerateEnd.Finish]
        FINISH_STOP: _ClassVar[GenerateEnd.Finish]
    FINISH_UNSPECIFIED: GenerateEnd.Finish
    FINISH_END: GenerateEnd.Finish
    FINISH_LENGTH: GenerateEnd.Finish
    FINISH_STOP: GenerateEnd.Finish
    FINISH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    finish: GenerateEnd.Finish
    prompt_tokens: int
    new_tokens: int
    model: str
    model_version: str
    def __init__(self, finish: _Optional[_Union[GenerateEnd.Finish, str]] = ..., prompt_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., model: _Optional[str] = ..., model_version: _Optional[str] = ...) -> None: ...
