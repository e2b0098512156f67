"""What bad input gets: a clear error for that text alone, or a result; its neighbours never notice."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, EngineConfig
from engine.prepare import Preparer
from engine.service import Analysis, Engine
from engine.tokens import Tokenizer
from tests.engine.fakes import FakeBackend, byte_tokenizer, fake_loader

Open = Callable[..., Any]
NO_CACHES = CacheConfig(token_bytes_max=0, result_bytes_max=0)
NEIGHBOURS = [f"Failed password for user{i} from 10.0.0.{i}" for i in range(40)]

REFUSED: list[tuple[object, str]] = [
    ("", "empty text"),
    ("\n\t \u2003", "empty text"),
    ("x" * (1 << 20), "engine.text_bytes_max"),
    ("\u0301" * (64 << 10), "engine.text_bytes_max"),
    ("a\ud800b", "lone surrogate at position 1"),
    ("\udcff" * 50, "lone surrogate at position 0"),
    (None, "not a text but NoneType"),
    (b"bytes", "not a text but bytes"),
    (7, "not a text but int"),
    (["a list"], "not a text but list"),
]
ANALYSED = [
    "\x00\x01\x02\x1b[31m\x7f binary",
    "\x7fELF\x02\x01\x01" + "".join(map(chr, range(256))) * 20,
    "\u200b\u200c\u200d\ufeff" * 100,
    "e" + "\u0301" * 30_000,
    "a" * 60_000,
    "a " * 30_000,
    "\u202eשלום עולם مرحبا \u202c",
    "👩‍👩‍👧‍👦" * 500,
    "\U0010ffff\U000e0001",
    "'; DROP TABLE texts; --",
    "[CLS] [SEP] [PAD] [MASK] " * 10,
    "<|endoftext|>" * 10,
]


def vector(analysis: Analysis) -> npt.NDArray[np.float32]:
    assert analysis.embedding is not None
    return np.frombuffer(analysis.embedding, "<f2").astype(np.float32)


def neighbours_are_right(got: list[Analysis], alone: list[Analysis]) -> bool:
    return [each.embedding for each in got] == [each.embedding for each in alone]


@pytest.mark.parametrize("caches", [CacheConfig(), NO_CACHES])
async def test_each_bad_text_gets_its_own_error_and_its_neighbours_their_results(
    open_engine: Open, minilm_tokenizer: Tokenizer, caches: CacheConfig
) -> None:
    backend = FakeBackend(length_max=minilm_tokenizer.length_max)
    loader = fake_loader(backend, tokenizer=minilm_tokenizer, batch_tokens=2048)
    engine: Engine = await open_engine(EngineConfig(caches=caches), loader=loader)
    alone = await engine.analyze(NEIGHBOURS, task="embed")
    texts: list[Any] = []
    for i, neighbour in enumerate(NEIGHBOURS):
        texts += [neighbour, REFUSED[i % len(REFUSED)][0], ANALYSED[i % len(ANALYSED)]]
    got = await engine.analyze(texts, task="embed")
    assert neighbours_are_right(got[::3], alone)
    for i, each in enumerate(got[1::3]):
        assert REFUSED[i % len(REFUSED)][1] in str(each.error)
        assert (each.reason, each.embedding) == ("text", None)
    assert [each.error for each in got[2::3]] == [None] * len(NEIGHBOURS)
    long = got[2::3][ANALYSED.index("a " * 30_000)]
    assert (long.truncated, long.token_count) == (True, minilm_tokenizer.length_max)
    assert long.dropped_tokens == 30_002 - minilm_tokenizer.length_max
    stats = engine.stats()
    assert stats.texts_failed == len(NEIGHBOURS)
    assert stats.tokens_dropped >= long.dropped_tokens
    sample = engine._telemetry.registry.get_sample_value
    assert sample("sluice_engine_tokens_dropped_total") == stats.tokens_dropped


async def test_a_real_model_survives_them_all(open_engine: Open, tiny_models: dict[str, Path]) -> None:
    config = EngineConfig(model=str(tiny_models["bert"]), device="cpu", precision="fp32", fit_seconds_max=0.1)
    engine: Engine = await open_engine(config)
    alone = await engine.analyze(NEIGHBOURS, task="embed")
    got = await engine.analyze([*NEIGHBOURS, *[text for text, _ in REFUSED], *ANALYSED], task="embed")
    count = len(NEIGHBOURS)
    for one, other in zip(got[:count], alone, strict=True):
        assert one.error is None
        assert float(vector(one) @ vector(other)) > 0.999
    assert all(each.reason == "text" for each in got[count : count + len(REFUSED)])
    assert all(each.error is None for each in got[count + len(REFUSED) :])


async def test_thousands_of_distinct_lengths_beside_bad_texts(open_engine: Open) -> None:
    backend = FakeBackend(length_max=512)
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(backend, batch_tokens=2048))
    texts: list[Any] = []
    for length in range(1, 3000):
        texts += ["z" * length, None] if length % 100 == 0 else ["z" * length]
    got = await engine.analyze(texts)
    assert [text is None for text in texts] == [each.error is not None for each in got]
    assert [each.truncated for each in got] == [isinstance(text, str) and len(text) > 510 for text in texts]


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.one_of(st.text(st.characters(), max_size=60), st.none(), st.binary(max_size=9)), max_size=40))
def test_any_mix_is_prepared_one_by_one_as_it_is_together(minilm_tokenizer: Tokenizer, texts: list[Any]) -> None:
    def seen(results: list[Any]) -> list[tuple[str, list[int] | None, int]]:
        return [(each.error, None if each.ids is None else each.ids.tolist(), each.dropped) for each in results]

    damage: list[str] = []
    together = Preparer(minilm_tokenizer, b"m", 100, CacheConfig(), damage.append)
    alone = Preparer(minilm_tokenizer, b"m", 100, NO_CACHES, damage.append)
    wanted = seen([alone.prepare([text], "s")[0] for text in texts])
    assert seen(together.prepare(texts, "s")) == wanted
    assert seen(together.prepare(texts, "s")) == wanted, "from the cache, too"
    assert damage == []
    together.close()
    alone.close()


class _Brittle:
    """A foreign tokenizer that breaks down on some texts, as a panic in Rust does: with no `Exception`."""

    class Panic(BaseException):
        """As `pyo3_runtime.PanicException`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def encode_batch_fast(self, texts: list[str]) -> Any:
        if any("panic" in text for text in texts):
            raise self.Panic(f"index out of bounds: {texts}")
        return self._inner.encode_batch_fast(texts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def test_a_text_that_breaks_the_tokenizer_fails_alone(open_engine: Open) -> None:
    tokenizer = Tokenizer(_Brittle(byte_tokenizer()._backend), 64)
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend(), tokenizer=tokenizer))
    alone = await engine.analyze(NEIGHBOURS, task="embed")
    got = await engine.analyze([*NEIGHBOURS, "panic now", *NEIGHBOURS, "panic again"], task="embed")
    failed = [each for each in got if each.error]
    assert [each.reason for each in failed] == ["text", "text"]
    assert "the tokenizer failed on it: Panic" in str(failed[0].error)
    assert "now" not in str(failed[0].error), "an error quotes no text"
    assert neighbours_are_right([each for each in got if not each.error], alone * 2)


async def test_a_text_without_any_token_is_an_error_and_not_an_empty_row(open_engine: Open) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers

    plain = Fast(models.WordLevel({"[UNK]": 0, "disk": 1, "full": 2}, unk_token="[UNK]"))
    plain.normalizer = normalizers.Replace("\u200b", "")
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    loader = fake_loader(FakeBackend(), tokenizer=Tokenizer(plain, 64))
    engine: Engine = await open_engine(EngineConfig(), loader=loader)
    for _ in range(2):
        good, empty = await engine.analyze(["disk full", "\u200b\u200b"], task="embed")
        assert good.token_count == 2
        assert "no token" in str(empty.error)
        assert empty.reason == "text"


async def test_a_token_that_the_model_does_not_know_never_reaches_the_device() -> None:
    tokenizer = byte_tokenizer()
    unknown = int(tokenizer.encode(["~"])[0].ids[1])
    preparer = Preparer(tokenizer, b"m", 1000, CacheConfig(), lambda _: None, vocabulary=unknown)
    for _ in range(2):
        good, bad = preparer.prepare(["AB", "AB~"], "s")
        assert good.ids is not None
        assert bad.ids is None
        assert f"token {unknown} is unknown to the model" in bad.error
    preparer.close()


async def test_the_reason_tells_what_went_wrong(open_engine: Open) -> None:
    poison = int(byte_tokenizer().encode(["~"])[0].ids[1])
    engine: Engine = await open_engine(EngineConfig(), loader=fake_loader(FakeBackend(poison=poison)))
    good, bad, device = await engine.analyze(["fine", "", "bad ~"])
    late = await engine.analyze(["in time?"], deadline_s=1e-9)
    assert [good.reason, bad.reason, device.reason, late[0].reason] == ["", "text", "device", "deadline"]


async def test_what_an_engine_leaves_behind_when_it_stops_may_be_asked_again(open_engine: Open) -> None:
    gate = threading.Event()
    backend = FakeBackend(gate=gate)
    engine: Engine = await open_engine(EngineConfig(batch_tokens=16), loader=fake_loader(backend))
    running = asyncio.create_task(engine.analyze([f"text {i}" for i in range(10)]))
    async with asyncio.timeout(20):
        while not backend.started.is_set():  # noqa: ASYNC110 - the device is a thread
            await asyncio.sleep(0.001)
    asyncio.get_running_loop().call_later(0.1, gate.set)
    await engine.close()
    assert {each.reason for each in await running} == {"", "stopped"}
