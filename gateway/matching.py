"""What the detectors share: spans, the left boundary in raw bytes, and words that announce a number. Pure."""

import re
from typing import Final, TypeAlias

Span: TypeAlias = tuple[int, int]

# Not preceded by a digit: at the start of a field the byte before is the last byte of its length, which may look like
# a digit but then follows a tag or another length byte.
LEFT_DIGIT: Final = rb"(?:^|[^0-9]|[\x0a\x12\x2a\x32\x80-\xff][0-9])"
# The same for a word of ASCII letters and digits.
LEFT_WORD: Final = rb"(?:^|[^0-9a-z]|[\x0a\x12\x2a\x32\x80-\xff][0-9a-z])"
CONTEXT_CHARACTERS: Final = 24


def digit_count(text: str) -> int:
    """How many digits a text has."""
    return sum(map(str.isdigit, text))


def behind(words: re.Pattern[str], text: str, position: int) -> bool:
    """Whether one of `words` ends just before `position`; each is anchored at its end."""
    return words.search(text[max(0, position - CONTEXT_CHARACTERS) : position]) is not None
