"""The site's policy: which records may leave. Pure.

A policy file is TOML: ordered `[[rules]]`, `[defaults]` for what no rule decides, and optionally `[scanner]`.

    [[rules]]
    name = "badge readers stay"
    stream = "badge*"            # globs: site, device, stream; labels = {area = "lab-*"}
    sensitivity = "internal"     # declared at least so
    found = ["payment_card"]     # any of these classes; "*": anything; "none": nothing
    outcome = "local"            # cloud, local or drop

The first rule that matches decides. Then the defaults, which fail closed: declared sensitive -> local; found anything
-> local; nothing found -> cloud. A record that could not be scanned stays on the site, whatever the rules say.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta, field

from gateway.batches import Decision
from gateway.detectors import OPAQUE_PAYLOAD, UNSCANNED
from gateway.scanner import ScannerConfig
from sluice.config import Section, load
from sluice.errors import ConfigError
from sluice.record import Route, Sensitivity

ANYTHING: Final = "*"
NOTHING: Final = "none"
UNSCANNED_RULE: Final = "default: unscanned"
_ROUTES: Final = {"cloud": Route.CLOUD, "local": Route.LOCAL, "drop": Route.DROP}


class PolicyConfig(Section, frozen=True, kw_only=True):
    """Where the policy is."""

    file: Annotated[str | None, Meta(description="The policy file (TOML); None: the built-in policy.")] = None
    reload_interval_s: Annotated[float, Meta(gt=0, description="How often the file is looked at for changes.")] = 2.0


class RuleConfig(Section, frozen=True, kw_only=True):
    """A rule: all its conditions hold, then its outcome."""

    name: Annotated[str, Meta(min_length=1, max_length=128, description="Shown as the reason.")]
    outcome: Annotated[Literal["cloud", "local", "drop", "redact"], Meta(description="Where a matching record goes.")]
    site: Annotated[str, Meta(description="Glob.")] = "*"
    device: Annotated[str, Meta(description="Glob.")] = "*"
    stream: Annotated[str, Meta(description="Glob.")] = "*"
    labels: Annotated[dict[str, str], Meta(description="Labels a record has: name = glob of the value.")] = field(
        default_factory=dict
    )
    sensitivity: Annotated[
        Literal["public", "internal", "sensitive"] | None, Meta(description="Declared at least so.")
    ] = None
    found: Annotated[
        tuple[str, ...], Meta(description="Classes of which one was found; '*': anything; 'none': nothing.")
    ] = ()


class DefaultsConfig(Section, frozen=True, kw_only=True):
    """What happens to records that no rule decides."""

    sensitive: Annotated[Literal["local", "drop"], Meta(description="Declared sensitive.")] = "local"
    found: Annotated[Literal["local", "drop"], Meta(description="Something was found.")] = "local"
    unspecified: Annotated[Literal["cloud", "local"], Meta(description="Nothing found, sensitivity not declared.")] = (
        "cloud"
    )
    clean: Annotated[Literal["cloud", "local"], Meta(description="Nothing found, declared public or internal.")] = (
        "cloud"
    )


class PolicyFile(Section, frozen=True, kw_only=True):
    """The whole policy file."""

    rules: Annotated[
        tuple[RuleConfig, ...], Meta(max_length=1000, description="In order; the first match decides.")
    ] = ()
    defaults: DefaultsConfig = DefaultsConfig()
    scanner: Annotated[ScannerConfig | None, Meta(description="Replaces the gateway's [scanner] section.")] = None


def read(path: Path) -> PolicyFile:
    """Reads a policy file.

    Raises:
        ConfigError: naming the file and the line or key.
    """
    return load(PolicyFile, path, environ={})


def configured(config: PolicyConfig) -> PolicyFile | None:
    """The policy file that a configuration names; None for the built-in policy.

    Raises:
        ConfigError: naming the key, the file, and the line or key in it.
    """
    if config.file is None:
        return None
    try:
        return read(Path(config.file))
    except ConfigError as error:
        raise ConfigError(f"policy.file: {error}") from error


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a batch says of itself, on which rules decide before any record is looked at."""

    site: str
    device_id: str
    stream: str
    sensitivity: Sensitivity


class Rule:
    """A compiled rule."""

    __slots__ = ("_globs", "_sensitivity", "found", "labels", "name", "route")

    def __init__(self, config: RuleConfig) -> None:
        self.name = config.name
        self.route = _ROUTES[config.outcome]
        self.found = frozenset(config.found)
        self.labels = {name: _glob(value) for name, value in config.labels.items()}
        self._globs = _glob(config.site), _glob(config.device), _glob(config.stream)
        self._sensitivity = Sensitivity[config.sensitivity.upper()] if config.sensitivity else Sensitivity.UNSPECIFIED

    def matches_envelope(self, envelope: Envelope) -> bool:
        """Whether the conditions that hold for whole batches do."""
        names = envelope.site, envelope.device_id, envelope.stream
        named = all(glob.match(name) for glob, name in zip(self._globs, names, strict=True))
        return named and envelope.sensitivity >= self._sensitivity

    def matches_record(self, labels: Mapping[str, str], found: AbstractSet[str]) -> bool:
        """Whether the conditions on a single record hold."""
        if self.found and not self._matches_found(found):
            return False
        return all(glob.match(labels[name]) if name in labels else False for name, glob in self.labels.items())

    def _matches_found(self, found: AbstractSet[str]) -> bool:
        if not found:
            return NOTHING in self.found
        return ANYTHING in self.found or not self.found.isdisjoint(found)


class Policy:
    """A compiled policy.

    Args:
        file: what it says.
        classes: every class that the scanner can report; a rule may name no other.

    Raises:
        ConfigError: naming the rule and the key.
    """

    def __init__(self, file: PolicyFile, classes: Iterable[str]) -> None:
        known = {*classes, ANYTHING, NOTHING, OPAQUE_PAYLOAD, UNSCANNED}
        for i, rule in enumerate(file.rules):
            _check(rule, f"rules[{i}] ({rule.name!r})", known)
        names = [rule.name for rule in file.rules]
        if len(set(names)) < len(names):
            twice = next(n for i, n in enumerate(names) if n in names[:i])
            raise ConfigError(f"rules: two have the name {twice!r}; a decision must name one")
        self.file = file
        self._rules = tuple(Rule(rule) for rule in file.rules)

    def for_envelope(self, envelope: Envelope) -> "BatchPolicy":
        """The part of the policy that can apply to the records of a batch."""
        rules = tuple(rule for rule in self._rules if rule.matches_envelope(envelope))
        return BatchPolicy(rules, self.file.defaults, envelope.sensitivity)


class BatchPolicy:
    """A policy, narrowed to one batch."""

    __slots__ = ("_defaults", "_rules", "_sensitivity")

    def __init__(self, rules: tuple[Rule, ...], defaults: DefaultsConfig, sensitivity: Sensitivity) -> None:
        self._rules = rules
        self._defaults = defaults
        self._sensitivity = sensitivity

    def needs_labels(self) -> bool:
        """Whether a record in which nothing is found can be decided only by its labels."""
        for rule in self._rules:
            if rule.labels:
                return True
            if rule.matches_record({}, frozenset()):
                return False
        return False

    def decide(self, labels: Callable[[], Mapping[str, str]], found: AbstractSet[str]) -> Decision:
        """The fate of a record.

        Args:
            labels: gives the record's labels; called only when a rule asks.
            found: classes that the scanner found.
        """
        classes = tuple(sorted(found))
        if UNSCANNED in found:
            return Decision(Route.LOCAL, UNSCANNED_RULE, classes)
        for rule in self._rules:
            if rule.matches_record(labels() if rule.labels else {}, found):
                return Decision(rule.route, rule.name, classes)
        outcome, name = self._default(found)
        return Decision(_ROUTES[outcome], name, classes)

    def _default(self, found: AbstractSet[str]) -> tuple[str, str]:
        if self._sensitivity >= Sensitivity.SENSITIVE:
            return self._defaults.sensitive, "default: declared sensitive"
        if found:
            return self._defaults.found, "default: found"
        if self._sensitivity is Sensitivity.UNSPECIFIED:
            return self._defaults.unspecified, "default: unspecified"
        return self._defaults.clean, "default: clean"


def warnings(file: PolicyFile) -> list[str]:
    """What a careful reader would ask about a valid policy."""
    asked: list[str] = []
    for i, rule in enumerate(file.rules):
        unconditional = not rule.found or ANYTHING in rule.found
        if rule.outcome == "cloud" and unconditional:
            asked.append(f"rules[{i}] ({rule.name!r}) sends records to the cloud whatever is found in them")
        if rule.outcome == "drop":
            asked.append(f"rules[{i}] ({rule.name!r}) drops records: they are counted and kept nowhere")
    return asked


def _check(rule: RuleConfig, where: str, known: AbstractSet[str]) -> None:
    if rule.outcome == "redact":
        raise ConfigError(f"{where}.outcome: 'redact' is not in this version; use 'local' (keep) or 'drop'")
    for name in rule.found:
        if name not in known:
            raise ConfigError(
                f"{where}.found: {name!r} is no class that runs; known are {', '.join(sorted(known))}; "
                "switch a detector on in scanner.detectors or add it to scanner.patterns"
            )


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
