"""The parts of the engine's benchmarks that decide what a figure means."""

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.engine import latency, padding, report, rounds, worker
from benchmarks.engine.texts import Workload

LENGTHS = [random.Random(3).randint(3, 256) for _ in range(500)]
EDGES = (8, 16, 32, 64, 128, 256)
PLANS = {
    "arrival": padding.arrival(LENGTHS),
    "window": padding.windowed(LENGTHS, 128),
    "classic": padding.bucketed(LENGTHS, padding.CLASSIC, rows=32),
    "budget": padding.bucketed(LENGTHS, EDGES, tokens=1024),
    "exact": padding.bucketed(LENGTHS, EDGES, tokens=1024, exact=True),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_text_is_in_one_batch_that_it_fits_in(plan: list[padding.Batch]) -> None:
    assert sorted(i for batch in plan for i in batch.rows) == list(range(len(LENGTHS)))
    assert all(LENGTHS[i] <= batch.length for batch in plan for i in batch.rows)


@pytest.mark.parametrize("name", ["budget", "exact"])
def test_a_batch_keeps_its_token_budget(name: str) -> None:
    assert max(len(batch.rows) * batch.length for batch in PLANS[name]) <= 1024


def test_padding_is_counted_over_all_computed_tokens() -> None:
    assert padding.share([padding.Batch((0, 1), 10)], [5, 10]) == pytest.approx(0.25)


def test_a_thinner_workload_has_the_same_lengths() -> None:
    whole = Workload("w", "", [f"text {i}" for i in range(len(LENGTHS))], LENGTHS)
    thin = whole.thin(4)
    assert len(thin.texts) == len(LENGTHS) // 4
    assert thin.tokens / len(thin.texts) == pytest.approx(whole.tokens / len(whole.texts), rel=0.02)


def test_every_entry_runs_once_a_round_and_none_is_always_first() -> None:
    orders = [rounds.order(5, turn) for turn in range(10)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert {order[0] for order in orders} == set(range(5))


def test_a_ratio_is_taken_within_rounds_and_by_tokens() -> None:
    fast = rounds.Measured(texts=10, tokens=100, seconds=[1.0, 2.0, 4.0], details={})
    slow = rounds.Measured(texts=5, tokens=50, seconds=[1.0, 3.0, 2.0], details={})
    assert rounds.ratio(fast, slow) == pytest.approx((2.0, 1.0, 3.0))


def test_rounds_end_when_time_is_up_but_one_is_whole() -> None:
    ran = []

    def entry(name: str) -> rounds.Entry:
        return rounds.Entry(name, lambda: (ran.append(name) or 1.0, {}), 1, 1)

    results = rounds.measure([entry("a"), entry("b")], 5, title="t", until_s=time.monotonic() - 1)
    assert ran == ["a", "b"]
    assert all(len(each.seconds) == 1 for each in results.values())


def test_arrivals_are_the_same_every_time_and_at_the_rate_that_was_asked_for() -> None:
    first = latency.arrivals(200.0, 60.0, texts=50)
    assert first == latency.arrivals(200.0, 60.0, texts=50)
    assert len(first) / 60 == pytest.approx(200, rel=0.05)
    assert sum(online for _, _, online in first) / len(first) == pytest.approx(latency.ONLINE_SHARE, rel=0.25)


async def test_a_system_that_blocks_the_sender_cannot_hide_it() -> None:
    """Ten texts are due at once and each blocks the loop for 20 ms: the last one waited for all of them."""

    async def submit(_text: str, _online: bool) -> None:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass

    measured = await worker.open_loop(submit, [(0.0, "x", False)] * 10, drain_s=5)
    assert max(measured["background_s"]) >= 0.2
    assert measured["sender_late_s_p99"] >= 0.1


async def test_what_is_not_answered_is_counted_with_what_it_waited() -> None:
    async def submit(_text: str, online: bool) -> None:
        if online:
            await asyncio.Event().wait()
        raise RuntimeError("refused")

    measured = await worker.open_loop(submit, [(0.0, "x", True), (0.0, "y", False)], drain_s=0.1)
    assert measured["unfinished"] == [1, 0]
    assert measured["failed"] == [0, 1]
    assert measured["online_s"][0] >= 0.1
    assert measured["background_s"] == []


def test_the_worker_keeps_its_answers_apart_from_what_libraries_print(tmp_path: Path) -> None:
    source = Path(worker.__file__).read_text(encoding="utf-8")
    (tmp_path / "worker.py").write_text(source, encoding="utf-8")
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "echo.py").write_text(
        "class System:\n"
        "    def embed(self, texts):\n"
        "        print('noise on stdout')\n"
        "        return [[float(len(text)), 1.0] for text in texts]\n"
        "def load(model, settings):\n"
        "    return System()\n",
        encoding="utf-8",
    )
    (tmp_path / "texts.json").write_text(json.dumps({"w": ["a", "bcd"]}), encoding="utf-8")
    command = [
        sys.executable,
        str(tmp_path / "worker.py"),
        "echo",
        "--model",
        ".",
        "--texts",
        str(tmp_path / "texts.json"),
    ]
    asked = '{"op": "run", "set": "w"}\n{"op": "run", "set": "none"}\n{"op": "quit"}\n'
    done = subprocess.run(
        command, input=asked, capture_output=True, text=True, timeout=60, check=True, env={"OMP_NUM_THREADS": "1"}
    )
    ready, ran, wrong = (json.loads(line) for line in done.stdout.splitlines())
    assert ready["ready"]
    assert ran["seconds"] > 0
    assert "KeyError" in wrong["error"]


def test_the_report_says_what_was_not_measured() -> None:
    where = {
        "cpu": "a CPU", "cores": 2, "threads": 2, "flags": ["avx2"], "memory_gib": 1.0, "gpu": "", "load_1min": 0.0,
        "omp_wait_policy": "PASSIVE", "date": "2026-01-01", "python": "3", "sluice": "0", "versions": {},
    }  # fmt: skip
    result = {
        "machine": where, "workloads": [], "rounds": 1, "mode": "quick", "padding": {"mix": {"policy": 0.125}},
        "unavailable": {"GPU": "no CUDA device here"},
    }  # fmt: skip
    text = report.render(result)
    assert "| policy | 12.5% |" in text
    assert "* GPU: no CUDA device here" in text
