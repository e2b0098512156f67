"""Patterns that users add: one hyperscan expression over UTF-8 bytes.

Hyperscan needs time linear in the text, so that no pattern can stall the gateway; it has no look-around and no
back-references. Over the batch runs the expression without its anchors (a superset, since the neighbours of a field
there are protobuf bytes); over a hit record's fields runs the expression itself.
"""

import re
from collections.abc import Iterator
from typing import Final

from gateway.matching import Span
from sluice.errors import ConfigError

# A quotation, an escape, a character class (with POSIX classes in it), or an anchor; in this order, so that what looks
# like an anchor inside the first three stays.
_TOKEN: Final = re.compile(r"\\Q.*?(?:\\E|\Z)|\\[bBAZz]|\\.|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]|\^|\$", re.DOTALL)
_ANCHORS: Final = frozenset({r"\b", r"\B", r"\A", r"\Z", r"\z", "^", "$"})


class UserPattern:
    """A named expression.

    Raises:
        ConfigError: when hyperscan refuses it, with its reason.
    """

    def __init__(self, name: str, expression: str) -> None:
        import hyperscan

        key = f"scanner.patterns.{name}"
        bare = _TOKEN.sub(lambda m: "" if m[0] in _ANCHORS else m[0], expression)
        self.prefilter = bare.encode()
        self._exact = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        try:
            hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK).compile(expressions=[self.prefilter], flags=0)
            self._exact.compile(expressions=[expression.encode()], flags=hyperscan.HS_FLAG_SOM_LEFTMOST)
        except hyperscan.error as error:
            raise ConfigError(f"{key}: hyperscan refuses {expression!r}: {error}") from error

    def find(self, text: str) -> Iterator[Span]:
        """The longest match from each start, in characters."""
        data = text.encode(errors="replace")
        longest: dict[int, int] = {}

        def on_match(_ident: int, start: int, end: int, _flags: int, _context: object) -> None:
            longest[start] = max(end, longest.get(start, 0))

        self._exact.scan(data, match_event_handler=on_match)
        return ((_characters(data, a), _characters(data, b)) for a, b in sorted(longest.items()))


def _characters(data: bytes, position: int) -> int:
    return len(data[:position].decode(errors="ignore"))
