"""Configuration of the lake and of the consumer that fills it. Imports neither pyarrow nor Kafka."""

from typing import Annotated, Literal

from msgspec import Meta, field

from sluice.config import Section

MIB = 1024 * 1024


class LakeConfig(Section, frozen=True, kw_only=True):
    """Where the lake is, when it is flushed, and its limits."""

    uri: Annotated[str, Meta(min_length=1, description="Directory, or s3://bucket/prefix, that holds the tables.")] = (
        "sluice-lake"
    )
    storage_options: Annotated[
        dict[str, str],
        Meta(description="For object stores, as in object_store (AWS_ENDPOINT_URL, ...); the environment counts too."),
    ] = field(default_factory=dict)
    staging_dir: Annotated[
        str | None,
        Meta(
            description="Where files are written before they are published. None: '.staging' in the lake "
            "(a directory) or the system's temporary folder (an object store). For a directory it must be on the "
            "lake's file system."
        ),
    ] = None
    fsync: Annotated[bool, Meta(description="Force files and commits of a local lake to disk before going on.")] = True
    cluster: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9._-]{1,128}$",
            description="Name of the Kafka cluster; the offsets in the lake are kept under it. A new name reads anew.",
        ),
    ] = "default"
    group_id: Annotated[str, Meta(min_length=1, description="Consumer group of the intake.")] = "sluice-lake"

    flush_bytes_max: Annotated[int, Meta(ge=64 * 1024, description="Flush when this much waits, decoded.")] = 128 * MIB
    flush_rows_max: Annotated[int, Meta(ge=1, description="Flush when this many rows and gaps wait.")] = 1_000_000
    flush_interval_s: Annotated[float, Meta(gt=0, description="Flush when the oldest row has waited so long.")] = 60.0
    flush_idle_s: Annotated[float, Meta(gt=0, description="Flush when nothing has arrived for so long.")] = 10.0
    chunk_bytes_max: Annotated[
        int, Meta(ge=1024, description="Envelopes decoded in one call, in bytes as received.")
    ] = 4 * MIB
    prefetch_bytes_max: Annotated[int, Meta(ge=MIB, description="What the Kafka client may hold ahead of us.")] = (
        16 * MIB
    )
    chunk_messages_max: Annotated[int, Meta(ge=1, description="Messages decoded in one call.")] = 1000

    row_group_rows: Annotated[int, Meta(ge=1000, description="Rows of a Parquet row group.")] = 500_000
    compression_level: Annotated[int, Meta(ge=1, le=19, description="zstd level of the Parquet files.")] = 1
    date_past_s_max: Annotated[
        float, Meta(ge=0, description="An event older than this at its receipt is filed under the date of receipt.")
    ] = 7 * 86_400.0
    date_future_s_max: Annotated[
        float,
        Meta(ge=0, description="An event further in the future at its receipt is filed under the date of receipt."),
    ] = 3_600.0
    checkpoint_interval_commits: Annotated[int, Meta(ge=2, description="Commits between Delta checkpoints.")] = 100
    log_retention_hours: Annotated[int, Meta(ge=1, description="Delta log entries older than this are removed.")] = 48

    dedup_spools_max: Annotated[
        int, Meta(ge=1, description="Spools whose positions are held in memory; others are read back when they return.")
    ] = 100_000
    dedup_runs_max: Annotated[
        int, Meta(ge=1000, description="Runs of positions held in memory, all spools together.")
    ] = 2_000_000
    commit_retry_s_max: Annotated[float, Meta(gt=0, description="Longest back-off after a failed commit.")] = 30.0
    on_offset_regression: Annotated[
        Literal["stop", "reset"],
        Meta(
            description="When Kafka's offsets do not reach the lake's (topic made anew) or no longer begin there "
            "(retention): stop with an error, or begin where Kafka begins. Nothing is written twice either way."
        ),
    ] = "stop"
    regression_grace_s: Annotated[
        float, Meta(gt=0, description="How long a partition must look shorter than the lake before that counts.")
    ] = 5.0
