"""The work before the device: check, hash, look up, tokenise. Many texts at a time, on one thread of its own.

Owns the caches and the tokenizer: nothing here is shared between threads. With an empty cache a text costs
a hash and its share of one batched tokenizer call; a text known to the token cache costs the hash; one
known to the result cache needs neither tokenizer nor device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.config import CacheConfig
from engine.results import DiskResults, MemoryResults, Output, ResultStore
from engine.token_cache import TokenCache
from engine.token_pool import TokenPool
from engine.tokens import Tokenizer, Tokens, check, content_key

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A tokenizer without special tokens makes nothing of, say, zero-width characters.
_NO_TOKENS: Final = "the tokenizer finds no token in it: nothing to analyse"


@dataclass(slots=True)
class Prepared:
    """One text, ready for the next step: it has an `error`, a cached `output`, or `ids` for the device.

    Attributes:
        key: content hash and model; identical texts have identical keys.
        error: what is wrong with the text.
        output: from the result cache.
        ids: token ids for the device.
        dropped: tokens that truncation took away.
    """

    key: bytes = b""
    error: str = ""
    output: Output | None = None
    ids: "npt.NDArray[np.int32] | None" = None
    dropped: int = 0


@dataclass(slots=True)
class CacheCounts:
    """Hits and misses so far."""

    token_hits: int = 0
    token_misses: int = 0
    result_hits: int = 0
    result_misses: int = 0


class Preparer:
    """See the module's docstring.

    Args:
        tokenizer: of the model.
        model_key: whatever else an output depends on (`Loaded.output_version`).
        text_bytes_max: longer texts are refused.
        config: of the caches.
        on_damage: told when a cache turns out to be damaged.
        processes: children that tokenise (see `token_pool`); 0 for none.
        vocabulary: tokens that the model knows; 0 when it does not say.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_key: bytes,
        text_bytes_max: int,
        config: CacheConfig,
        on_damage: Callable[[str], None],
        processes: int = 0,
        vocabulary: int = 0,
    ) -> None:
        # Some tokenizers have tokens that the model has not, and never use them; a GPU that meets one is lost.
        self._ids_max = vocabulary if 0 < vocabulary < tokenizer.vocabulary else 0
        self._model_key = model_key
        self._text_bytes_max = text_bytes_max
        self._skip = frozenset(config.skip_streams)
        self._tokens = _token_cache(config, tokenizer, on_damage)
        self._results = _result_store(config, on_damage)
        self._pool = TokenPool(tokenizer, processes, on_trouble=on_damage) if processes else None
        self._encode = self._pool.encode if self._pool else tokenizer.encode
        self.counts = CacheCounts()

    def prepare(self, texts: Sequence[object], stream: str) -> list[Prepared]:
        """One result per text, in order."""
        cached = not self._skip & {stream, "*"}
        if self._tokens is not None:
            self._tokens.refresh()
        prepared: list[Prepared] = []
        left: list[tuple[Prepared, str]] = []
        for text in texts:
            item = self._look_up(text, cached=cached)
            prepared.append(item)
            if item.ids is None and item.output is None and not item.error:
                assert isinstance(text, str), "anything else has an error"
                # What was hashed, and not what a subclass (an Enum) says about itself.
                left.append((item, str.__str__(text)))
        self._tokenize(left, cached=cached)
        return prepared

    def remember(self, outputs: Sequence[tuple[bytes, Output]]) -> None:
        """Puts outputs into the result cache."""
        if self._results is not None:
            for key, output in outputs:
                self._results.put(key, output.pack())

    def caches(self, stream: str) -> bool:
        """Whether results of a stream may be remembered."""
        return self._results is not None and not self._skip & {stream, "*"}

    def close(self) -> None:
        """Closes the caches and ends the children. Idempotent."""
        if self._pool is not None:
            self._pool.close()
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
        if self._results is not None:
            self._results.close()
            self._results = None

    def _look_up(self, text: object, *, cached: bool) -> Prepared:
        data, error = check(text, self._text_bytes_max)
        if error:
            return Prepared(error=error)
        content = content_key(data)
        item = Prepared(key=content + self._model_key)
        if cached:
            item.output = self._result(item.key)
            if item.output is None:
                item.ids, item.dropped = self._cached_tokens(content)
        return item

    def _result(self, key: bytes) -> Output | None:
        if self._results is None:
            return None
        value = self._results.get(key)
        output = Output.unpack(value) if value is not None else None
        self.counts.result_hits += output is not None
        self.counts.result_misses += output is None
        return output

    def _cached_tokens(self, content: bytes) -> "tuple[npt.NDArray[np.int32] | None, int]":
        if self._tokens is None:
            return None, 0
        found = self._tokens.get(content)
        self.counts.token_hits += found is not None
        self.counts.token_misses += found is None
        return found or (None, 0)

    def _tokenize(self, left: list[tuple[Prepared, str]], *, cached: bool) -> None:
        if not left:
            return
        # Identical texts of one call are tokenised once.
        distinct = {item.key: text for item, text in left}
        tokens = dict(zip(distinct, self._encoded(list(distinct.values())), strict=True))
        for item, _ in left:
            each = tokens[item.key]
            if isinstance(each, str):
                item.error = each
            else:
                item.ids, item.dropped = each.ids, each.dropped
        if cached and self._tokens is not None:
            for key, each in tokens.items():
                if not isinstance(each, str):
                    self._tokens.put(key[:16], each.ids, each.dropped)

    def _encoded(self, texts: list[str]) -> list[Tokens | str]:
        """Tokens, or what is wrong with that text alone."""
        try:
            return [self._wrong(tokens) or tokens for tokens in self._encode(texts)]
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            if len(texts) == 1:
                # Its message may quote the text, and messages are logged.
                return [f"the tokenizer failed on it: {type(error).__name__}"]
            return [self._encoded([text])[0] for text in texts]

    def _wrong(self, tokens: Tokens) -> str:
        if not len(tokens.ids):
            return _NO_TOKENS
        if self._ids_max and (highest := int(tokens.ids.max())) >= self._ids_max:
            return f"token {highest} is unknown to the model, which has {self._ids_max}: the tokenizer of another one?"
        return ""


def _token_cache(config: CacheConfig, tokenizer: Tokenizer, on_damage: Callable[[str], None]) -> TokenCache | None:
    if not config.token_bytes_max:
        return None
    return TokenCache(
        bytes_max=config.token_bytes_max,
        entries_max=config.token_entries_max,
        version=tokenizer.version,
        width=tokenizer.id_width,
        directory=Path(config.directory) if config.directory else None,
        on_damage=on_damage,
    )


def _result_store(config: CacheConfig, on_damage: Callable[[str], None]) -> ResultStore | None:
    if not config.result_bytes_max:
        return None
    if config.directory:
        directory = Path(config.directory) / "results"
        try:
            return DiskResults(directory, config.result_bytes_max, config.result_ttl_s, on_damage)
        except Exception as error:  # noqa: BLE001 - OSError, and sqlite3 and diskcache raise many kinds
            on_damage(f"result cache: {directory} cannot be used ({type(error).__name__}); it stays in memory")
    return MemoryResults(config.result_bytes_max, config.result_ttl_s)
