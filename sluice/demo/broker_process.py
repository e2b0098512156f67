"""What the two embedded brokers share as processes: a ready line, a clean end on SIGTERM, one line for an error.

A broker process prints `ready NAME HOST:PORT` on stdout once it answers, and nothing else there. It exits with 0 after
SIGTERM, SIGINT or the death of its parent, 1 when the broker ended by itself, 2 for a wrong option or a taken port.
"""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import click

from sluice.demo.loopback import HOST
from sluice.errors import ConfigError, MissingExtra, Permanent, SluiceError
from sluice.parent import die_with_parent

_POLL_S = 0.2


class StopSignal:
    """SIGTERM, SIGINT and the parent's death, as one event. Made in the main thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)
        die_with_parent(signal.SIGTERM)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self._event.set()

    def is_set(self) -> bool:
        """Whether it is time to end."""
        return self._event.is_set()

    def wait_while(self, alive: Callable[[], bool]) -> None:
        """Returns when asked to stop.

        Raises:
            Permanent: when `alive` turns false first.
        """
        # The signal may reach a thread of the broker, which does not wake this one: hence the short waits.
        while not self._event.wait(_POLL_S):
            if not alive():
                raise Permanent("the broker ended by itself")


def announce(name: str, port: int) -> None:
    """Prints the ready line."""
    click.echo(ready_line(name, port))
    sys.stdout.flush()


def ready_line(name: str, port: int) -> str:
    """The line that a broker prints when it answers."""
    return f"ready {name} {HOST}:{port}"


def run(serve: Callable[[], None], module: str) -> None:
    """Runs a broker's main; an expected error is one line on stderr and an exit status.

    Args:
        serve: returns when the broker was asked to stop.
        module: of the extra `embedded`, which the broker needs.
    """
    try:
        serve()
    except SluiceError as error:
        click.echo(f"sluice demo: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        click.echo(f"sluice demo: {MissingExtra('embedded', module)}", err=True)
        sys.exit(2)
