"""The work before the device: what is looked up, what is tokenised, what is counted."""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import CacheConfig
from engine.prepare import Preparer
from engine.results import Output
from engine.token_pool import TEXTS_MIN
from engine.tokens import Tokenizer
from tests.engine.fakes import byte_tokenizer

TEXTS = [f"text number {i}" for i in range(100)]
Open = Callable[..., Preparer]


@pytest.fixture
def damage() -> list[str]:
    return []


@pytest.fixture
def open_preparer(damage: list[str]) -> Iterator[Open]:
    opened: list[Preparer] = []

    def start(config: CacheConfig | None = None, tokenizer: Tokenizer | None = None, **more: Any) -> Preparer:
        arguments = (tokenizer or byte_tokenizer(), b"model", 1000, config or CacheConfig(), damage.append)
        opened.append(Preparer(*arguments, **more))
        return opened[-1]

    yield start
    for preparer in opened:
        preparer.close()
        preparer.close()


def ids(results: Any) -> list[list[int]]:
    return [each.ids.tolist() for each in results]


def test_a_text_that_prints_otherwise_is_taken_by_its_content(open_preparer: Open) -> None:
    class Kind(StrEnum):
        FULL = "disk full"

        def __str__(self) -> str:
            return "another text"

    preparer = open_preparer()
    (first,) = preparer.prepare([Kind.FULL], "s")
    (second,) = preparer.prepare(["disk full"], "s")
    assert preparer.counts.token_hits == 1
    assert ids([first, second]) == [ids(open_preparer().prepare(["disk full"], "s"))[0]] * 2


def test_hits_and_misses_are_counted(open_preparer: Open) -> None:
    preparer = open_preparer()
    fresh = preparer.prepare([*TEXTS, TEXTS[0], ""], "s")
    assert astuple(preparer.counts) == (0, 101, 0, 101)
    known = preparer.prepare(TEXTS, "s")
    assert astuple(preparer.counts) == (100, 101, 0, 201)
    assert ids(known) == ids(fresh[:100])
    preparer.remember([(each.key, Output(np.ones(4, np.float16), 7, 2)) for each in known[:10]])
    again = preparer.prepare(TEXTS, "s")
    assert astuple(preparer.counts) == (190, 101, 10, 291)
    assert [each.output is not None for each in again] == [True] * 10 + [False] * 90
    assert (again[0].output.tokens, again[0].output.dropped) == (7, 2)  # type: ignore[union-attr]


def test_processes_share_a_directory_and_each_finds_what_the_first_one_tokenised(
    open_preparer: Open, tmp_path: Path, damage: list[str]
) -> None:
    config = CacheConfig(directory=str(tmp_path / "caches"))
    first, second = open_preparer(config), open_preparer(config)
    wanted = ids(first.prepare(TEXTS, "s"))
    assert ids(second.prepare(TEXTS, "s")) == wanted
    assert (second.counts.token_hits, second.counts.token_misses) == (100, 0)
    own = ids(second.prepare(["its own"], "s"))
    assert ids(second.prepare(["its own"], "s")) == own
    assert second.counts.token_hits == 101
    first.remember([(first.prepare(["shared"], "s")[0].key, Output(np.ones(4, np.float16), 3, 0))])
    assert second.prepare(["shared"], "s")[0].output is not None
    assert damage == []


@pytest.mark.parametrize("in_the_way", ["caches", "caches/results"])
def test_a_directory_that_cannot_be_used_is_said_and_costs_nothing_else(
    open_preparer: Open, tmp_path: Path, damage: list[str], in_the_way: str
) -> None:
    file = tmp_path / in_the_way
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file")
    preparer = open_preparer(CacheConfig(directory=str(tmp_path / "caches")))
    wanted = ids(preparer.prepare(TEXTS, "s"))
    assert ids(preparer.prepare(TEXTS, "s")) == wanted
    assert preparer.counts.token_hits == 100
    assert any("cannot be used" in each for each in damage)


def test_children_tokenise_what_no_cache_knows(open_preparer: Open, damage: list[str]) -> None:
    texts = [f"text {i} " * 20 for i in range(2 * TEXTS_MIN)]
    wanted = [(each.ids.tolist(), each.dropped) for each in open_preparer().prepare(texts, "s")]  # type: ignore[union-attr]
    preparer = open_preparer(processes=2)
    assert preparer._pool is not None
    preparer._pool.wait()
    for _ in range(2):
        got = [(each.ids.tolist(), each.dropped) for each in preparer.prepare(texts, "s")]  # type: ignore[union-attr]
        assert got == wanted
    assert astuple(preparer.counts)[:2] == (len(texts), len(texts))
    assert damage == []
