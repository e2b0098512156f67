"""Batching policies against each other in virtual time: who waits how long, and how much of the work is padding.

`python benchmarks/engine/scheduling.py [--lanes N] [--texts N] [--json]` runs in seconds, on no device: a batch takes
what the cost model says (the default: MiniLM on two CPU cores, 5 ms a batch and 0.13 ms a token). Lengths are a
log-normal mix (88% around 20 tokens, 12% around 210, as log lines are), a fifth of the texts is online. Saturation:
everything waits at the start. Load: Poisson arrivals at a share of what our padded policy does at saturation, so that
every policy sees the same arrivals.

Policies: one by one; first in, first out in batches of 32; a sort of 8 batches of 32 (as infinity-emb does); the
classic buckets 32/64/128/256, padded to their edges; ours with the fixed shapes of CUDA graphs (edges of the ladder,
steps of rows); ours padded to the longest row; ours packed (no padding).
"""

import argparse
import json
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol

from engine.buckets import Ladder
from engine.config import LADDER, EngineConfig
from engine.cost import CostModel
from engine.lane import Item, Priority
from engine.scheduler import Limits, Scheduler, Terms
from engine.torch_cuda import ROW_LADDER

COST = CostModel(launch_s=0.005, token_s=0.00013, attention_s=0.0, row_s=0.0)
LENGTH_MAX = 256
LOADS = (0.2, 0.5, 0.8)
NEVER = float("inf")


class Policy(Protocol):
    """What decides which texts run together."""

    row_steps: Sequence[int]

    def add(self, item: Item) -> None:
        """A text arrives."""

    def take(self, now_s: float) -> tuple[Sequence[Item], int | None]:
        """The next batch and its padded length; None packs it. Empty when nothing waits."""


class Fifo:
    """First in, first out, at most `rows` at a time, padded to the longest."""

    row_steps: Sequence[int] = ()

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._queue: deque[Item] = deque()

    def add(self, item: Item) -> None:
        self._queue.append(item)

    def take(self, now_s: float) -> tuple[Sequence[Item], int | None]:
        batch = [self._queue.popleft() for _ in range(min(self._rows, len(self._queue)))]
        return batch, max((item.tokens for item in batch), default=0)


class Sorted:
    """Takes `window` batches of `rows` at once, sorts them by length, and runs them one after the other."""

    row_steps: Sequence[int] = ()

    def __init__(self, rows: int = 32, window: int = 8) -> None:
        self._rows, self._window = rows, window
        self._queue: deque[Item] = deque()
        self._ready: deque[list[Item]] = deque()

    def add(self, item: Item) -> None:
        self._queue.append(item)

    def take(self, now_s: float) -> tuple[Sequence[Item], int | None]:
        if not self._ready:
            taken = [self._queue.popleft() for _ in range(min(self._rows * self._window, len(self._queue)))]
            if len(taken) > self._rows:
                taken.sort(key=lambda item: item.tokens)
            self._ready.extend(taken[i : i + self._rows] for i in range(0, len(taken), self._rows))
        batch = self._ready.popleft() if self._ready else []
        return batch, max((item.tokens for item in batch), default=0)


class Ours:
    """The engine's scheduler with its default configuration."""

    def __init__(
        self,
        cost: CostModel = COST,
        edges: Sequence[int] = LADDER,
        *,
        packed: bool = False,
        exact: bool = True,
        row_steps: tuple[int, ...] = (),
    ) -> None:
        config = EngineConfig()
        waits = (config.online_max_wait_ms / 1000, config.background_max_wait_ms / 1000)
        limits = Limits(cost.budget_tokens(), config.batch_rows_max, 1 << 40, config.online_share, waits)
        ladder = Ladder(edges, LENGTH_MAX)
        self._scheduler = Scheduler(ladder.refined() if exact or packed else ladder, limits, cost)
        self._terms = Terms(limits.batch_tokens, cost, packed, row_steps)
        self.row_steps = row_steps
        self._exact = exact

    def add(self, item: Item) -> None:
        self._scheduler.add([item])

    def take(self, now_s: float) -> tuple[Sequence[Item], int | None]:
        got = self._scheduler.next_batch(now_s, self._terms)
        if self._terms.packed:
            return got.batch, None
        return got.batch, max((i.tokens for i in got.batch), default=0) if self._exact else got.length


POLICIES: dict[str, Callable[[], Policy]] = {
    "one by one": lambda: Fifo(1),
    "first in, first out, 32": lambda: Fifo(32),
    "sort of 8 x 32": Sorted,
    "classic buckets": lambda: Ours(edges=(32, 64, 128, 256), exact=False),
    "ours, CUDA graphs": lambda: Ours(exact=False, row_steps=ROW_LADDER),
    "ours, padded": Ours,
    "ours, packed": lambda: Ours(packed=True),
}


@dataclass
class Outcome:
    """What a simulation saw. `latency_s` is per text, in the order of arrival."""

    seconds: float = 0.0
    latency_s: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    computed: int = 0
    batches: list[tuple[float, tuple[Item, ...]]] = field(default_factory=list)

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.computed if self.computed else 0.0

    def latency(self, share: float, items: Sequence[Item], priority: Priority) -> float:
        """A quantile over the texts of one priority, in seconds."""
        ordered = sorted(self.latency_s[item.id] for item in items if item.priority is priority)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def lengths(count: int, seed: int = 7) -> list[int]:
    """Tokens of `count` texts of the mix, special tokens included."""
    chance = random.Random(seed)

    def one() -> int:
        median, spread = (210, 0.35) if chance.random() < 0.12 else (20, 0.55)
        return min(LENGTH_MAX, max(6, min(400, int(chance.lognormvariate(math.log(median), spread)))))

    return [one() for _ in range(count)]


def texts(count: int, rate: float = 0.0, online: float = 0.2, seed: int = 3) -> list[Item]:
    """Texts at Poisson times, or all at the start when `rate` is 0."""
    chance = random.Random(seed)
    now, items = 0.0, []
    for number, tokens in enumerate(lengths(count)):
        now += chance.expovariate(rate) if rate else 0.0
        priority = Priority.ONLINE if chance.random() < online else Priority.BACKGROUND
        items.append(Item(number, tokens, priority, now))
    return items


def simulate(policy: Policy, items: Sequence[Item], cost: CostModel = COST, lanes: int = 1) -> Outcome:
    """Runs all items through a policy on `lanes` devices that take what the cost model says."""
    outcome = Outcome()
    free = [0.0] * lanes  # a heap of when each lane is free
    following = 0
    while len(outcome.latency_s) < len(items):
        now = heappop(free)
        while following < len(items) and items[following].arrived_s <= now:
            policy.add(items[following])
            following += 1
        batch, length = policy.take(now)
        if not batch:
            heappush(free, items[following].arrived_s if following < len(items) else min(free, default=NEVER))
            continue
        own = [item.tokens if length is None else length for item in batch]
        filled = min((step for step in policy.row_steps if step >= len(own)), default=len(own))
        own += [length or 0] * (filled - len(own))
        end = now + cost.work_s(len(own), sum(own), sum(n * n for n in own))
        outcome.tokens += sum(item.tokens for item in batch)
        outcome.computed += sum(own)
        outcome.batches.append((now, tuple(batch)))
        outcome.latency_s.update((item.id, end - item.arrived_s) for item in batch)
        outcome.seconds = max(outcome.seconds, end)
        heappush(free, end)
    return outcome


def table(count: int, lanes: int) -> list[dict[str, Any]]:
    """A row per policy: texts/s at saturation, padding, and latencies in milliseconds per load."""
    rows = []
    backlog = texts(count)
    capacity = count / simulate(Ours(), backlog, lanes=lanes).seconds
    for name, policy in POLICIES.items():
        full = simulate(policy(), backlog, lanes=lanes)
        row: dict[str, Any] = {
            "policy": name,
            "texts_per_s": count / full.seconds,
            "padding_share": full.padding_share,
            "tokens_per_batch": statistics.fmean(sum(i.tokens for i in batch) for _, batch in full.batches),
        }
        for load in LOADS:
            arriving = texts(count, rate=load * capacity)
            seen = simulate(policy(), arriving, lanes=lanes)
            row[f"padding_share_{load:.0%}"] = seen.padding_share
            for priority in Priority:
                for share in (0.5, 0.99):
                    key = f"{priority.name.lower()}_ms_p{share * 100:.0f}_{load:.0%}"
                    row[key] = seen.latency(share, arriving, priority) * 1e3
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    loads = "".join(f" | at {load:.0%}: online p50/p99, background p50/p99 ms, padding" for load in LOADS)
    print(f"{'policy':24} texts/s padding{loads}")
    for row in rows:
        cells = [f"{row['policy']:24} {row['texts_per_s']:7.1f} {row['padding_share']:7.1%}"]
        for load in LOADS:
            times = [
                row[f"{priority.name.lower()}_ms_p{share}_{load:.0%}"] for priority in Priority for share in (50, 99)
            ]
            cells.append("".join(f"{ms:9.0f}" for ms in times) + f" {row[f'padding_share_{load:.0%}']:6.1%}")
        print(" | ".join(cells))


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=6000)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = table(options.texts, options.lanes)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
