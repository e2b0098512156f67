"""Every task gives what plain transformers give one text at a time, on every path through the engine.

Which texts share a batch follows from a cost model that is put in, not measured: that a path was really taken is
asserted, and does not depend on how busy the machine is. Tolerances: in fp32 a cosine above 0.9999 and scores within
0.001; in half precision a cosine above 0.999 and probabilities within 0.015 (fp16) or 0.1 (bf16, which has three bits
less), novelty within 0.005.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from engine.backend import BackendInfo, DeviceOutOfMemory
from engine.buckets import Ladder
from engine.config import CacheConfig, EngineConfig, NoveltyConfig
from engine.cost import CostModel, CostTracker
from engine.loading import Loaded, load
from engine.scheduler import Scheduler
from engine.service import Analysis, Engine
from tests.engine import plain
from tests.engine.plain import Expected
from tests.engine.tiny import WORDS

Open = Callable[..., Any]

NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
LADDER = (8, 12, 16, 24, 32)
# A launch costs so much that any text may ride with any other; or nothing, so that only equal classes meet.
ANY_RIDES = CostModel(launch_s=1.0, token_s=1e-6, attention_s=0.0, row_s=0.0)
NONE_RIDES = CostModel(launch_s=0.0, token_s=1e-6, attention_s=0.0, row_s=0.0)
LABELS = {
    "disk": ("the disk is full", "error on the disk"),
    "login": ("login of user failed", "user login"),
    "link": ("the link is lost", "link stopped"),
}
# Of probabilities.
NEAR = {"fp32": 0.001, "fp16": 0.015, "bf16": 0.1}
# Of novelty: in fp32, and in half precision.
NOVELTY_NEAR = (0.001, 0.005)
# Small, so that kinds are merged, opened and replaced within the texts below.
NOVELTY = NoveltyConfig(centroids_max=5, warmup_texts=10, merge_similarity=0.91)


def texts() -> list[str]:
    """Of 1 to 60 words, of few different ones each so that texts differ, some with a relative; the longest are cut."""
    chance = np.random.default_rng(11)
    kinds = [chance.choice(WORDS, size=2, replace=False) for _ in range(40)]
    drawn = [" ".join(chance.choice(kind, size=1 + 59 * i // 39)) for i, kind in enumerate(kinds)]
    related = [f"{text} ok" for text in drawn[9::5]]
    return [*[drawn[i] for i in chance.permutation(len(drawn))], *related, "磁盘已满 /dev/sda1", "naïve café"]


TEXTS = texts()


@dataclass(frozen=True)
class Case:
    """A task of a model."""

    task: str
    model: str
    zero_shot: bool = False

    def __str__(self) -> str:
        return f"{'zero-shot' if self.zero_shot else self.task}-{self.model}"


CASES = [
    Case("embed", "bert"),
    Case("embed", "bert-cls"),
    Case("embed", "distilbert"),
    Case("classify", "head"),
    Case("classify", "roberta"),
    Case("classify", "bert", zero_shot=True),
    Case("tokens", "ner"),
    Case("tokens", "ner-bytes"),
    Case("novelty", "bert"),
]


@dataclass(frozen=True)
class Route:
    """A way through the engine.

    Attributes:
        name: of the path.
        config: that leads there.
        cost: see above.
        fixed: padded to the bucket's edge, as where graphs are replayed; else to the longest text.
        tokens_max: what fits into memory.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    cost: CostModel = ANY_RIDES
    fixed: bool = False
    tokens_max: int = 1 << 30

    def __str__(self) -> str:
        return self.name


PADDED = {"packing": "off"}
PACKED = Route("packed", {"prepack": "off"})
BUCKETED = Route("bucketed", PADDED, NONE_RIDES, fixed=True)
SPILLED = Route("spilled", PADDED)
SPLIT = Route("split", PADDED, tokens_max=100)
SPLIT_PACKED = Route("split packed", {"prepack": "off"}, tokens_max=100)
HALVES = [
    replace(route, name=f"{precision} {route.name}", config={**route.config, "precision": precision})
    for precision in ("bf16", "fp16")
    for route in (PACKED, SPILLED)
]
ON_GPU = [
    Route(f"cuda {precision} {name}", {"device": "cuda:0", "precision": precision, "cuda_graphs_max": graphs}, **more)
    for precision in ("fp32", "fp16")
    for name, graphs, more in (
        ("graphs", 64, {}),
        ("eager", 0, {}),
        ("graphs split", 64, {"tokens_max": 100}),
        ("eager split", 0, {"tokens_max": 100}),
    )
]
# Only BERT's own encoder is computed packed.
NEVER_PACKED = {"distilbert", "roberta", "ner-bytes"}
TAKEN = [
    pytest.param(case, route, id=f"{case}-{route}", marks=[pytest.mark.gpu] if route in ON_GPU else [])
    for case in CASES
    for route in (PACKED, BUCKETED, SPILLED, SPLIT, SPLIT_PACKED, *HALVES, *ON_GPU)
    if "packed" not in route.name or case.model not in NEVER_PACKED
]


class Watched:
    """A real backend that notes its batches, and has as little memory as the test says."""

    def __init__(self, backend: Any, route: Route) -> None:
        self._backend = backend
        self._route = route
        self.batches: list[tuple[list[int], int]] = []
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    @property
    def info(self) -> BackendInfo:
        told: BackendInfo = self._backend.info
        return replace(told, exact_lengths=False) if self._route.fixed else told

    def submit(self, rows: Any, length: int) -> object:
        lengths = [len(row) for row in rows]
        if sum(self.info.computed(lengths, length)) > self._route.tokens_max:
            self.failures += 1
            raise DeviceOutOfMemory("little memory")
        self.batches.append((lengths, length))
        return self._backend.submit(rows, length)


def watched_loader(route: Route, seen: list[Watched]) -> Callable[[EngineConfig], Loaded]:
    """Loads as always; then cost model and classes of lengths are those of the route."""

    def watched(section: EngineConfig) -> Loaded:
        loaded = load(section)
        (device,) = loaded.devices
        device.backend = Watched(device.backend, route)
        seen.append(device.backend)
        # It is refitted after so many batches that no test here comes to it.
        device.costs = CostTracker()
        device.costs.model = route.cost
        coarse = Ladder(section.ladder, device.backend.info.length_max)
        loaded.ladder = coarse if route.fixed else coarse.refined()
        loaded.scheduler = Scheduler(loaded.ladder, loaded.scheduler.limits, route.cost)
        return loaded

    return watched


def section(folder: Path, case: Case, route: Route, **changes: Any) -> EngineConfig:
    settings = {"device": "cpu", "backend": "torch", "precision": "fp32", "threads": 1, "workers": 1}
    fixed = {"fit_seconds_max": 0.01, "batch_tokens": 256, "ladder": LADDER, "caches": NO_CACHES, "novelty": NOVELTY}
    labels = {"labels": LABELS} if case.zero_shot else {}
    return EngineConfig(model=str(folder), **{**settings, **fixed, **labels, **route.config, **changes})


async def opened(open_engine: Open, folder: Path, case: Case, route: Route, **changes: Any) -> tuple[Engine, Watched]:
    seen: list[Watched] = []
    engine = await open_engine(section(folder, case, route, **changes), loader=watched_loader(route, seen))
    return engine, seen[0]


@pytest.fixture(scope="module")
def sharp_models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small models with heads that are sure of what they say: else any answer would be within the tolerance."""
    from safetensors.numpy import load_file, save_file

    root = tmp_path_factory.mktemp("sharp")
    for name in sorted({case.model for case in CASES}):
        copytree(tiny_models[name], root / name)
        weights = load_file(root / name / "model.safetensors")
        surer = 6 if name.startswith("ner") else 4
        heads = {key: surer * value if "classifier" in key else value for key, value in weights.items()}
        save_file(heads, root / name / "model.safetensors", metadata={"format": "pt"})
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def expected(sharp_models: dict[str, Path]) -> Callable[[Case, Engine], Sequence[Expected]]:
    """The reference of a case; each is computed once."""

    @cache
    def find(case: Case, temperature: float) -> Sequence[Expected]:
        folder = sharp_models[case.model]
        if case.zero_shot:
            return plain.zero_shot(folder, TEXTS, LABELS, temperature)
        if case.task == "novelty":
            return plain.novelties(folder, TEXTS, NOVELTY)
        return {"embed": plain.embedded, "classify": plain.classified, "tokens": plain.spans}[case.task](folder, TEXTS)

    def of(case: Case, engine: Engine) -> Sequence[Expected]:
        classifier: Any = engine._models["default"].session.loaded.tasks.get("classify")
        return find(case, classifier.temperature if case.zero_shot else 0.0)

    return of


def check(case: Case, found: list[Analysis], expected: Sequence[Expected], precision: str) -> None:
    """Raises unless every result is that of plain transformers."""
    assert [each.error for each in found] == [None] * len(TEXTS)
    wrong = {
        TEXTS[i]: (found[i], expected[i]) for i in range(len(TEXTS)) if not same(case, found[i], expected[i], precision)
    }
    assert not wrong, f"{len(wrong)} of {len(TEXTS)}"


def same(case: Case, found: Analysis, expected: Expected, precision: str) -> bool:
    half = precision != "fp32"
    near = NOVELTY_NEAR[half] if case.task == "novelty" else NEAR[precision]
    if case.task == "embed":
        assert expected.embedding is not None
        return plain.cosine(plain.vector_of(found), expected.embedding) > (0.999 if half else 0.9999)
    if case.task == "classify":
        # Of two labels that are as good either may be named, with a score of its own.
        share = expected.shares[found.label]
        return abs(found.score - share) < near and max(expected.shares.values()) - share < near
    if case.task == "novelty":
        return found.score == found.novelty and abs(found.score - expected.novelty) < near
    if [replace(span, score=0.0) for span in found.spans] == [replace(span, score=0.0) for span in expected.spans]:
        pairs = zip(found.spans, expected.spans, strict=True)
        return all(abs(one.score - other.score) < near for one, other in pairs)
    return expected.margin < near


def classes(batch: tuple[list[int], int], edges: Sequence[int] = LADDER) -> set[int]:
    """The buckets that a batch's texts are of."""
    return {min((edge for edge in edges if edge >= length), default=1 << 30) for length in batch[0]}


def taken(route: Route, engine: Engine, backend: Watched) -> bool:
    """Whether the path was."""
    batches = backend.batches
    uneven = any(len(set(lengths)) > 1 for lengths, _ in batches)
    mixed = any(len(classes(each)) > 1 for each in batches)
    split = engine.stats().batch_splits > 0 and backend.failures > 0
    if route.tokens_max < 1 << 30:
        return split and uneven
    if route.fixed:
        return uneven and not mixed and all(length in {*LADDER, backend.info.length_max} for _, length in batches)
    return mixed and not split


@pytest.mark.parametrize(("case", "route"), TAKEN)
async def test_what_is_computed_equals_plain_transformers_one_by_one(
    open_engine: Open,
    sharp_models: dict[str, Path],
    expected: Callable[[Case, Engine], Sequence[Expected]],
    case: Case,
    route: Route,
) -> None:
    engine, backend = await opened(open_engine, sharp_models[case.model], case, route)
    found = await engine.analyze(TEXTS, task=case.task, stream="s")
    assert taken(route, engine, backend), backend.batches
    info = backend.info
    assert info.precision == route.config.get("precision", "fp32")
    assert info.packed is ("packed" in route.name)
    if "graphs" in route.name:
        assert any(backend._graphs.values()), "nothing was captured"
    check(case, found, expected(case, engine), info.precision)


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_what_comes_from_a_cache_equals_plain_transformers_one_by_one(
    open_engine: Open,
    sharp_models: dict[str, Path],
    tmp_path: Path,
    expected: Callable[[Case, Engine], Sequence[Expected]],
    case: Case,
) -> None:
    folder, kept = sharp_models[case.model], str(tmp_path)
    engine, _ = await opened(open_engine, folder, case, SPILLED, caches=CacheConfig(directory=kept))
    await engine.analyze(TEXTS, task=case.task, stream="s")
    found = await engine.analyze(TEXTS, task=case.task, stream="another that knows nothing yet")
    stats = engine.stats()
    assert (stats.texts_computed, stats.result_cache_hits) == (len(TEXTS), len(TEXTS))
    check(case, found, expected(case, engine), "fp32")
    await engine.drain(10)
    # Tokens alone from the cache.
    caches = CacheConfig(directory=kept, result_bytes_max=0)
    engine, backend = await opened(open_engine, folder, case, SPILLED, caches=caches)
    found = await engine.analyze(TEXTS, task=case.task, stream="a third one")
    assert taken(SPILLED, engine, backend)
    assert (engine.stats().token_cache_hits, engine.stats().texts_computed) == (len(TEXTS), len(TEXTS))
    check(case, found, expected(case, engine), "fp32")


def test_the_texts_put_the_tolerances_to_the_test(sharp_models: dict[str, Path]) -> None:
    """Answers differ from text to text, and few lie so near an edge that another one would be accepted too."""
    vectors = plain.embeddings(plain.encoder(sharp_models["bert"]), plain.card_of(sharp_models["bert"]), TEXTS)
    assert np.median(vectors @ vectors.T) < 0.9
    for name in ("head", "roberta"):
        best = [max(each.shares.values()) for each in plain.classified(sharp_models[name], TEXTS)]
        assert np.std(best) > 0.06
    for name in ("ner", "ner-bytes"):
        found = plain.spans(sharp_models[name], TEXTS)
        assert sum(bool(each.spans) and each.margin > NEAR["fp16"] for each in found) > 0.7 * len(TEXTS)
    stream = plain.PlainStream(NOVELTY)
    read = [stream.read(row) for row in vectors]
    assert min(stream.merged, stream.replaced) > 10
    assert min(each.margin for each in read) > 0.005
    assert np.std([each.novelty for each in read]) > 0.03
