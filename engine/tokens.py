"""Text to token ids, many texts at a time, with truncation that is counted.

Truncation is done here and not in the tokenizer, so that the number of dropped tokens is known: the head of
the text is kept, then the special tokens that end every text ([SEP]).

Fails: a text that is no text (not encodable as UTF-8, empty, too long in bytes) gets a message of its own;
the others in the batch are not touched.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from engine.spans import Alignment

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SAMPLE: Final = "a sample"

_Number = TypeVar("_Number", bound="np.generic")


def check(text: object, bytes_max: int) -> tuple[bytes, str]:
    """The text as UTF-8 and an empty message, or no bytes and what is wrong with it."""
    if not isinstance(text, str):
        return b"", f"not a text but {type(text).__name__}"
    if not text or text.isspace():
        return b"", "empty text: nothing to analyse"
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        return b"", f"not valid Unicode: lone surrogate at position {error.start}"
    if len(data) > bytes_max:
        return b"", f"text of {len(data)} bytes exceeds {bytes_max} (engine.text_bytes_max)"
    return data, ""


def content_key(data: bytes) -> bytes:
    """The 16-byte hash that caches know a text by."""
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Tokens:
    """One text for the model.

    Attributes:
        ids: int32, with special tokens, at most the model's longest input.
        dropped: tokens that truncation took away.
    """

    ids: "npt.NDArray[np.int32]"
    dropped: int


class Tokenizer:
    """A fast (Rust) tokenizer with the model's limit.

    Args:
        backend: a `tokenizers.Tokenizer`; its own truncation and padding are switched off.
        length_max: longest input of the model in tokens, special tokens included.
    """

    def __init__(self, backend: Any, length_max: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.length_max = length_max
        # Serialising once is dear but exact: whatever changes a token id changes the version.
        self.version = hashlib.blake2b(
            backend.to_str().encode() + length_max.to_bytes(4, "little"), digest_size=32
        ).digest()
        # Once: in transformers 5 the vocabulary is rebuilt on every question about it.
        self.vocabulary = backend.get_vocab_size(with_added_tokens=True)
        self.id_width = 2 if self.vocabulary <= 1 << 16 else 4
        self._unknown = _unknown_id(backend)
        mask = backend.encode_batch([_SAMPLE])[0].special_tokens_mask
        self._tail = next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def to_json(self) -> str:
        """As `tokenizer.json` has it; `tokenizers.Tokenizer.from_str` makes one with the same ids."""
        return str(self._backend.to_str())

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenises valid texts (see `check`) in one call, on all cores; releases the GIL."""
        import numpy as np

        encoded = self._backend.encode_batch_fast(list(texts))
        return [self._cut(np.array(each.ids, np.int32)) for each in encoded]

    def align(self, texts: Sequence[str]) -> list[Alignment]:
        """Where each text's tokens (those that `encode` keeps) are in it; tokenises anew, in one call.

        Alignments are not kept beside ids in the caches: they are three times as large, and only spans need them.
        """
        encoded = self._backend.encode_batch(list(texts))
        return [self._aligned(each, text) for each, text in zip(encoded, texts, strict=True)]

    def _aligned(self, encoded: Any, text: str) -> Alignment:
        import numpy as np

        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        if getattr(self._backend.model, "continuing_subword_prefix", None):
            # The prefix makes a token that continues a word longer than its text.
            continues = np.array([len(token) for token in encoded.tokens]) != offsets[:, 1] - offsets[:, 0]
        else:
            starts = offsets[:, 0].tolist()
            continues = np.array([start > 0 and " " not in text[start - 1 : start + 1] for start in starts])
        continues &= np.array(encoded.ids) != self._unknown
        special = np.array(encoded.special_tokens_mask, bool)
        return Alignment(self._kept(offsets), self._kept(special), self._kept(continues))

    def _cut(self, ids: "npt.NDArray[np.int32]") -> Tokens:
        return Tokens(self._kept(ids), max(0, len(ids) - self.length_max))

    def _kept(self, values: "npt.NDArray[_Number]") -> "npt.NDArray[_Number]":
        """The head of a text's tokens, then the special ones at its end; all of them when they fit."""
        import numpy as np

        if len(values) <= self.length_max:
            return values
        head = self.length_max - self._tail
        return np.concatenate([values[:head], values[len(values) - self._tail :]])


def _unknown_id(backend: Any) -> int:
    """The id of the token that stands for what the vocabulary lacks; -1 when there is none."""
    name = getattr(backend.model, "unk_token", None)
    found = backend.token_to_id(name) if name else getattr(backend.model, "unk_id", None)
    return -1 if found is None else int(found)
