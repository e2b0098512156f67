"""The three kinds of trouble, and how callers react.

Every foreign exception is translated at the border where it enters (MQTT, Kafka, disk, model) into one of these, so
that the code in between decides by kind and never by library.
"""


class SluiceError(Exception):
    """Base of every error that Sluice raises on purpose. Its text names the file, key or record and the way out."""


class Retryable(SluiceError):
    """It failed now and may succeed later with the same input: a broker that is away, a time-out."""


class Permanent(SluiceError):
    """The same input will always fail: a corrupt envelope, a missing model. Quarantine it or stop; never retry."""


class Backpressure(SluiceError):
    """A limit is reached. Try again after `retry_after_s` seconds, or slow the producer down."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConfigError(Permanent):
    """A configuration file, an environment variable or a flag is wrong. The CLI prints it and exits with 2."""


class MissingExtra(Permanent):
    """A package of an optional extra is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(
            f"this command needs the extra '{extra}' (module '{module}' is not installed): "
            f"pip install 'sluice-stream[{extra}]'"
        )
        self.extra = extra
