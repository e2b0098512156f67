"""What a history is made of besides its actors: chance, time and faults. One seed, one history."""

import random
from dataclasses import dataclass, field, fields

_TICK_US_MAX = 40_000


class Crash(Exception):
    """kill -9 of the actor that is at work: what it has in memory is gone, what it has on disk is not."""


@dataclass
class Faults:
    """How likely each kind of trouble is, whenever it could happen. All zero: a calm sea.

    Attributes:
        lose: a PUBACKed message vanishes in the broker.
        duplicate: a message is delivered twice.
        reorder: a message overtakes others.
        corrupt: a bit of a message flips.
        disconnect: a client's connection ends; what it had not acknowledged comes again.
        forget: the broker restarts without its memory.
        crash: an actor dies at one of its crash points.
        kafka_timeout: a producer is told that a record timed out, written or not.
        store_unanswered: a commit fails before or after it happened, and nobody knows which.
        rebalance: a partition gets another owner while the old one still believes that it is its own.
    """

    lose: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    disconnect: float = 0.0
    forget: float = 0.0
    crash: float = 0.0
    kafka_timeout: float = 0.0
    store_unanswered: float = 0.0
    rebalance: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> "Faults":
        """Each kind is absent, rare or frequent: histories in which everything fails all the time find little."""
        rare = {"forget", "rebalance", "corrupt"}
        return cls(**{each.name: rng.choice([0.0, 0.01, 0.05 if each.name in rare else 0.2]) for each in fields(cls)})


@dataclass
class World:
    """Chance and time of one history."""

    seed: int
    rng: random.Random = field(init=False)
    faults: Faults = field(init=False)
    time_us: int = 1_750_000_000_000_000
    tick_us_max: int = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.faults = Faults.draw(self.rng)
        # From a gateway that answers at once to one that answers after the device has sent everything again.
        self.tick_us_max = self.rng.choice([_TICK_US_MAX, 400_000, 4_000_000])

    def chance(self, probability: float) -> bool:
        """True with this probability. Draws nothing when it is zero, so that faults can be taken out one by one."""
        return probability > 0 and self.rng.random() < probability

    def crash_point(self) -> None:
        """A place where the actor at work may die."""
        if self.chance(self.faults.crash):
            raise Crash

    def calm(self) -> None:
        """From now on nothing fails and nobody is slow any more: what is left must come to its end."""
        self.faults = Faults()
        self.tick_us_max = _TICK_US_MAX

    def tick(self) -> None:
        """Time passes."""
        self.time_us += self.rng.randrange(1, self.tick_us_max)
