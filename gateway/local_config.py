"""Configuration of what happens to records that stay on the site."""

from typing import Annotated, Literal

from msgspec import Meta

from sluice.config import Section

MIB = 1024 * 1024
ExportField = Literal["label", "score", "novelty", "token_count", "truncated", "event_time"]


class AnalysisConfig(Section, frozen=True, kw_only=True):
    """On-site analysis of sealed records, and what of it may leave."""

    enabled: Annotated[bool, Meta(description="Whether sealed texts are analysed.")] = True
    task: Annotated[str, Meta(min_length=1, description="The engine's task.")] = "classify"
    streams: Annotated[tuple[str, ...], Meta(description="Globs of the streams that are analysed.")] = ("*",)
    export_fields: Annotated[
        tuple[ExportField, ...],
        Meta(description="What of a result goes to the cloud beside its identity; empty: nothing is sent."),
    ] = ("label", "score")
    texts_per_call_max: Annotated[int, Meta(ge=1, le=65536, description="Texts given to the engine at once.")] = 256
    timeout_s: Annotated[float, Meta(gt=0, description="Limit for one call of the engine.")] = 60.0
    retry_delay_s_max: Annotated[float, Meta(gt=0, description="Longest back-off after a failure.")] = 30.0
    poll_interval_s: Annotated[float, Meta(gt=0, description="How often the store is looked at unasked.")] = 5.0


class LocalConfig(Section, frozen=True, kw_only=True):
    """The sealed store."""

    directory: Annotated[str, Meta(min_length=1, description="Where it lies; mode 0700.")] = "sealed"
    key_file: Annotated[
        str | None, Meta(description="File of exactly 16 or 32 random bytes; None: `sealed.key` beside the directory.")
    ] = None
    key_create: Annotated[
        bool, Meta(description="Make the key when there is none. For trying; in production bring your own.")
    ] = False
    bytes_max: Annotated[int, Meta(ge=MIB, description="Size; when full the gateway stops acknowledging.")] = (
        10 * 1024 * MIB
    )
    retention_days: Annotated[float, Meta(gt=0, description="Age at which records are deleted.")] = 30.0
    commit_delay_s: Annotated[
        float, Meta(ge=0, le=0.2, description="How long a write may wait for others to share its fsync.")
    ] = 0.05
    commit_bytes_max: Annotated[int, Meta(ge=1024, description="Records of one commit.")] = 16 * MIB
    pending_bytes_max: Annotated[int, Meta(ge=1024, description="Records waiting for their commit.")] = 64 * MIB
    rotate_bytes: Annotated[int, Meta(ge=1024, description="Files of this size are not merged again.")] = 64 * MIB
    rotate_s: Annotated[float, Meta(gt=0, description="Time that a merged file spans; retention is as fine.")] = (
        86_400.0
    )
    merge_files: Annotated[int, Meta(ge=2, le=1024, description="Neighbouring small files that are merged.")] = 32
    maintenance_interval_s: Annotated[float, Meta(gt=0, description="How often merging and retention look.")] = 5.0
    retry_after_s: Annotated[float, Meta(gt=0, description="Asked of senders while the store is full.")] = 5.0
    analysis: AnalysisConfig = AnalysisConfig()
