"""How many lanes a CPU gets, with how many threads each: chosen by measurement at start-up.

A lane is a Backend driven by a thread of its own. Two lanes of one thread spare the barriers that two threads
of one lane meet after every operation, and the time in which Python launches the next one; one lane of all
threads answers a single text sooner. Lanes share their weights (`Backend.twin`), so a further one costs only
its scratch memory.

Fails: never; what cannot be measured in time leaves one lane.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol, Self, runtime_checkable

from engine.backend import Backend, DeviceOutOfMemory
from engine.probe import probe_batch

# More lanes delay a single text: they must be worth it.
GAIN_MIN: Final = 1.05
# So must a pin, and clearly: whatever else runs on its CPU, the lane cannot move away. Beside a program that only read
# files now and then, pinned lanes lost a third of their speed and others nothing.
PIN_GAIN_MIN: Final = 1.15
ROUNDS_MAX: Final = 5
# One round of all candidates is worth more time than was given: to guess cost half the speed where it was seen.
FIRST_ROUND_PATIENCE: Final = 4


@runtime_checkable
class Twinned(Backend, Protocol):
    """A backend that can be driven by several threads, one lane each."""

    def twin(self, threads: int = 0, cpus: Sequence[int] = ()) -> Self:
        """Another lane on the same weights, with a state of its own; `close` both.

        Args:
            threads: intra-operation threads, set on the thread that drives the twin, at its first batch; 0: as is.
            cpus: that the driving thread is pinned to, at its first batch; none: not pinned.
        """
        ...


@dataclass(frozen=True, slots=True)
class LanePlan:
    """What `choose_lanes` found.

    Attributes:
        lanes: backends to drive, each by a thread of its own; at least 1.
        threads: intra-operation threads of each.
        pin: whether each lane's thread is pinned to CPUs of its own.
        reason: for `sluice engine plan`.
    """

    lanes: int
    threads: int
    pin: bool
    reason: str

    def cpus(self, lane: int, allowed_cpus: Sequence[int]) -> tuple[int, ...]:
        """Those of one lane (from 0), for `Twinned.twin`; none when lanes are not pinned."""
        return tuple(allowed_cpus[lane * self.threads : (lane + 1) * self.threads]) if self.pin else ()

    def __str__(self) -> str:
        return f"{self.lanes} x {self.threads} threads{' pinned' if self.pin else ''}"


def choose_lanes(
    backend: Backend,
    allowed_cpus: Sequence[int],
    seconds_max: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    pins: bool = True,
) -> LanePlan:
    """Measures the candidates, in turns, for at most about `seconds_max` seconds.

    Args:
        backend: open, and not driven by anybody meanwhile. Without a `twin` method it gets one lane.
        allowed_cpus: of this process, ascending.
        seconds_max: when FIRST_ROUND_PATIENCE times this is too short for one round of all candidates, one lane of all
            CPUs is chosen.
        clock: monotonic seconds.
        pins: whether lanes may be tied to these CPUs.

    Returns:
        The plan. `LanePlan(1, len(allowed_cpus), False, reason)` where nothing is there to choose from.
    """
    count = max(1, len(allowed_cpus))
    if count == 1 or not isinstance(backend, Twinned):
        why = "one CPU is allowed" if count == 1 else "the backend cannot be driven by several threads"
        return LanePlan(1, count, pin=False, reason=f"1 lane: {why}")
    plans = candidates(count, pins=pins)
    try:
        least = _measure(backend, plans, allowed_cpus, seconds_max, clock)
    except DeviceOutOfMemory:
        return LanePlan(1, count, pin=False, reason="1 lane: memory ran out when several were tried")
    if least is None:
        return LanePlan(
            1, count, pin=False, reason=f"1 lane: {FIRST_ROUND_PATIENCE * seconds_max:g} s were too short to compare"
        )
    best = _best(plans, least)
    measured = ", ".join(f"{plan} {least[0] / seconds:.2f}" for plan, seconds in zip(plans, least, strict=True))
    return LanePlan(best.lanes, best.threads, best.pin, f"{best}: measured {measured} times one lane's speed")


def candidates(cpus: int, *, pins: bool = True) -> list[LanePlan]:
    """All ways to divide `cpus` evenly into lanes of 1, 2, 4, ... threads, also pinned if `pins`; one of all first."""
    plans = [LanePlan(1, cpus, pin=False, reason="")]
    threads = 1
    while threads < cpus:
        if cpus % threads == 0:
            plans += [LanePlan(cpus // threads, threads, pin, reason="") for pin in (False, *[True] * pins)]
        threads *= 2
    return plans


def _best(plans: Sequence[LanePlan], least: Sequence[float]) -> LanePlan:
    """The fastest, where a lane more and a pin each have to pay."""
    handicap = {(False, False): 1.0, (True, False): GAIN_MIN, (True, True): GAIN_MIN * PIN_GAIN_MIN}
    scored = [seconds * handicap[plan.lanes > 1, plan.pin] for plan, seconds in zip(plans, least, strict=True)]
    return plans[scored.index(min(scored))]


def _measure(
    backend: Twinned, plans: Sequence[LanePlan], cpus: Sequence[int], seconds_max: float, clock: Callable[[], float]
) -> list[float] | None:
    """The least time in seconds that each plan takes for one batch per CPU; None when the time was too short."""
    begun_s = clock()
    least = [float("inf")] * len(plans)
    with ExitStack() as stack:
        crews = [_Crew(stack, backend, plan, cpus) for plan in plans]
        for round_ in range(ROUNDS_MAX + 1):
            for place, crew in enumerate(crews):
                if round_ < 2 and place and clock() - begun_s >= FIRST_ROUND_PATIENCE * seconds_max:
                    return None
                start = clock()
                crew.work(len(cpus) // crew.lanes if round_ else 1)
                if round_:  # the first one warms up
                    least[place] = min(least[place], clock() - start)
            if round_ and clock() - begun_s >= seconds_max:
                break
    return least


class _Crew:
    """The lanes of one plan, each with a thread of its own, which keeps its settings to itself."""

    def __init__(self, stack: ExitStack, backend: Twinned, plan: LanePlan, cpus: Sequence[int]) -> None:
        self._twins = [backend.twin(plan.threads, plan.cpus(lane, cpus)) for lane in range(plan.lanes)]
        self._threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in self._twins]
        for twin in self._twins:
            stack.callback(twin.close)
        self._rows = probe_batch(backend.info.length_max)

    @property
    def lanes(self) -> int:
        return len(self._twins)

    def work(self, batches: int) -> None:
        """Runs `batches` in each lane and waits for all."""
        pairs = zip(self._threads, self._twins, strict=True)
        running = [thread.submit(self._run, twin, batches) for thread, twin in pairs]
        wait(running)
        for each in running:
            each.result()

    def _run(self, twin: Twinned, batches: int) -> None:
        for _ in range(batches):
            twin.collect(twin.submit(self._rows, len(self._rows[0])))
