"""Histories: `python -m tests.sim [--histories N] [--seed S] [--bug NAME]`. A failure prints its seed."""

import time
from collections.abc import Iterator

import click

from tests.sim.bugs import Bug
from tests.sim.history import Broken, History

HISTORIES_PER_BUG_MAX = 1000


def failures(first_seed: int, count: int, bug: Bug | None = None) -> Iterator[tuple[int, Broken]]:
    """The seeds among `count` from `first_seed` on whose history broke a promise, and how."""
    for seed in range(first_seed, first_seed + count):
        try:
            History(seed, bug).run()
        except Broken as error:
            yield seed, error


@click.command()
@click.option("--histories", default=2000, show_default=True, help="Histories without a bug.")
@click.option("--seed", default=0, show_default=True, help="The first seed.")
@click.option("--bug", type=click.Choice([bug.name for bug in Bug]), help="Only this bug; every history that finds it.")
def main(histories: int, seed: int, bug: str | None) -> None:
    """Runs histories; exits with 1 when a promise broke, or when a seeded bug was not found."""
    started = time.perf_counter()
    broken = [f"seed {at}: {error}" for at, error in failures(seed, histories, Bug[bug] if bug else None)]
    took_s = time.perf_counter() - started
    print(
        f"{histories} histories from seed {seed}{f' with {bug}' if bug else ''}: {len(broken)} broken, {took_s:.1f} s"
    )
    print(*broken[:20], sep="\n")
    if bug:
        return
    for each in Bug:
        first = next(failures(seed, HISTORIES_PER_BUG_MAX, each), None)
        said = f"found at history {first[0] - seed + 1}: {first[1]}"[:150] if first else "NOT FOUND"
        print(f"  {each.name:32} {said}")
        broken += [] if first else [each.name]
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
