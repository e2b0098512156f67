"""What a subscriber wants to see. Pure.

Empty lists match everything; texts are globs as in fnmatch, case-sensitive. Site, device and stream are properties of a
whole batch, so a batch passes or not; only `labels` and `score_min` look into results.
"""

import fnmatch
import math
import re
from collections.abc import Sequence
from typing import Final

from protos import feed_pb2
from sluice.errors import Permanent

GLOBS_MAX: Final = 256
GLOB_CHARS_MAX: Final = 256
KINDS: Final = frozenset({feed_pb2.KIND_RECORDS, feed_pb2.KIND_RESULTS})


class FeedFilter:
    """A compiled `sluice.v1.Filter`.

    Args:
        message: as the client sent it.

    Raises:
        Permanent: naming the field, when it is not a filter.
    """

    def __init__(self, message: feed_pb2.Filter) -> None:
        unknown = [kind for kind in message.kinds if kind not in KINDS]
        if unknown:
            raise Permanent(f"filter.kinds: unknown kind {unknown[0]}; known are KIND_RECORDS and KIND_RESULTS")
        if not math.isfinite(message.score_min):
            raise Permanent(f"filter.score_min: {message.score_min} is not a number")
        self.kinds = frozenset(message.kinds) or KINDS
        self._sites = compile_globs("filter.sites", message.sites)
        self._devices = compile_globs("filter.devices", message.devices)
        self._streams = compile_globs("filter.streams", message.streams)
        self._labels = compile_globs("filter.labels", message.labels)
        self._score_min = message.score_min

    def passes(self, site: str, device: str, stream: str) -> bool:
        """Whether a batch of this origin is wanted at all."""
        return (
            (self._sites is None or self._sites.match(site) is not None)
            and (self._devices is None or self._devices.match(device) is not None)
            and (self._streams is None or self._streams.match(stream) is not None)
        )

    @property
    def looks_into_results(self) -> bool:
        """Whether single results have to be looked at."""
        return self._labels is not None or self._score_min > 0

    def select(self, results: Sequence[feed_pb2.Result]) -> list[feed_pb2.Result]:
        """The results that are wanted, in order."""
        return [result for result in results if self._wants(result)]

    def _wants(self, result: feed_pb2.Result) -> bool:
        if result.score < self._score_min:
            return False
        return self._labels is None or self._labels.match(result.label) is not None


def compile_globs(field: str, globs: Sequence[str]) -> re.Pattern[str] | None:
    """One pattern that matches what any of the globs matches; None when there are none.

    Raises:
        Permanent: naming the field, when there are too many or one is too long.
    """
    if len(globs) > GLOBS_MAX:
        raise Permanent(f"{field}: {len(globs)} globs, allowed are {GLOBS_MAX}")
    for glob in globs:
        if len(glob) > GLOB_CHARS_MAX:
            raise Permanent(f"{field}: a glob of {len(glob)} characters, allowed are {GLOB_CHARS_MAX}")
    if not globs or "*" in globs:
        return None
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs))
