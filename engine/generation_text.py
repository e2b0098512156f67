"""From token ids to text while they arrive. Pure.

A token is not a piece of text: a character may span several tokens, and what a token looks like depends on the one
before it (a blank, an accent). `Detokenizer` therefore decodes the last tokens anew with each one, and gives out only
what no further token can change. `Stops` ends a text in front of the first stop text, even when that spans pieces.

The pieces joined are the decoding of all tokens at once. One exception: decoders that spell unknown characters as
bytes (`<0xE2>`) turn a whole run of bytes into replacement characters when any of it is invalid; what was already
given out then stays as it was.
"""

from collections.abc import Callable, Sequence
from typing import Final

# What decoders put where bytes are no valid UTF-8, and so also where a character is not complete yet.
_REPLACEMENT: Final = "\ufffd"
# A character has at most 4 bytes and a context of one more; a longer run of replacements is no character to come.
_INCOMPLETE_MAX: Final = 8
# Tokens decoded anew at most; reached only by tokens that are no text at all.
_WINDOW_MAX: Final = 256


class Detokenizer:
    """Text, piece by piece.

    Args:
        decode: all of some token ids at once, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # begins where a character begins
        self._sent = 0  # characters of the window's text that were given out
        self._clean = 0  # tokens of the window up to the last place where all text was complete

    def push(self, token: int) -> str:
        """The text that is certain now; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = len(text.rstrip(_REPLACEMENT))
        if len(text) - certain > _INCOMPLETE_MAX:
            certain = len(text)
        piece = text[self._sent : certain]
        self._sent = max(self._sent, certain)
        if (certain == len(text) and text) or len(self._window) >= _WINDOW_MAX:
            self._advance(text)
        return piece

    def flush(self) -> str:
        """What is left at the end."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _advance(self, text: str) -> None:
        """Drops tokens from the window's front; those since the place before stay, as the context of the next."""
        rest = self._window[self._clean :]
        context = self._decode(rest) if self._clean else text
        # A context without text (a special token) would make the next token look like the first of all.
        if context:
            self._window, self._sent, self._clean = rest, len(context), len(rest)


class Stops:
    """Ends a text in front of the first of some stop texts.

    Args:
        stops: not empty, each.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.reached = False

    def push(self, piece: str) -> str:
        """What can be given out; nothing after a stop text. Holds back what may be the beginning of one."""
        if self.reached or not piece:
            return ""
        text = self._held + piece
        found = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.reached, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
