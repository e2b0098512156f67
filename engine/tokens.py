"""Text to token ids, many texts at a time, with truncation that is counted.

Truncation is done here and not in the tokenizer, so that the number of dropped tokens is known: the head of
the text is kept, then the special tokens that end every text ([SEP]).

Fails: a text that is no text (not encodable as UTF-8, empty, too long in bytes) gets a message of its own;
the others in the batch are not touched.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_SAMPLE: Final = "a sample"


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
        self.id_width = 2 if backend.get_vocab_size(with_added_tokens=True) <= 1 << 16 else 4
        mask = backend.encode_batch([_SAMPLE])[0].special_tokens_mask
        self._tail = next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenises valid texts (see `check`) in one call, on all cores; releases the GIL."""
        import numpy as np

        encoded = self._backend.encode_batch_fast(list(texts))
        return [self._cut(np.array(each.ids, np.int32)) for each in encoded]

    def _cut(self, ids: "npt.NDArray[np.int32]") -> Tokens:
        import numpy as np

        dropped = len(ids) - self.length_max
        if dropped <= 0:
            return Tokens(ids, 0)
        head = self.length_max - self._tail
        return Tokens(np.concatenate([ids[:head], ids[len(ids) - self._tail :]]), dropped)
