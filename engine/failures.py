"""Why a text has no result: one class per kind of trouble, and the word that callers map to their codes.

* `text`: the text itself cannot be analysed, whatever the engine's state.
* `deadline`: it was not computed in time.
* `device`: the device failed on it, also alone: out of memory, or an error of the library that computes.
* `model`: the model cannot do what was asked of it with this text.
* `stopped`: the engine stopped, or its compute thread died, while the text was under way. Asked again, after a
  restart, it may get a result.
"""

from typing import Literal

from sluice.errors import Permanent, Retryable

Reason = Literal["", "text", "deadline", "device", "model", "stopped"]


class BadText(Permanent):
    """A text that cannot be analysed, whatever the engine's state."""


class DeadlinePassed(Retryable):
    """A text was not computed in time."""


class EngineStopped(Retryable):
    """The engine stopped, or its compute thread died, while a text was under way."""


def reason_of(error: BaseException | None) -> Reason:
    """The word for an error of one text; `stopped` for no error and no result."""
    if isinstance(error, BadText):
        return "text"
    if isinstance(error, DeadlinePassed):
        return "deadline"
    if error is None or isinstance(error, EngineStopped):
        return "stopped"
    return "model" if isinstance(error, Permanent) else "device"
