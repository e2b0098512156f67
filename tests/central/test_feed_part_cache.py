"""What is built for one subscriber is kept for the next, within its limit."""

import pytest

from central.feed_batches import Part
from central.part_cache import PartCache


@pytest.mark.parametrize("parts", [[], [Part(b"", 0, 0)], [Part(b"x" * 1000, 1, 0)]], ids=["receipt", "empty", "body"])
async def test_entries_of_any_size_are_bounded(parts: list[Part]) -> None:
    cache, built = PartCache(bytes_max=64 * 1024), 0

    def build() -> list[Part]:
        nonlocal built
        built += 1
        return list(parts)

    for offset in range(1000):
        assert await cache.get((0, ("t", 0), offset), build) == parts
    assert cache.bytes_held <= 64 * 1024
    await cache.get((0, ("t", 0), 999), build)
    assert built == 1000, "the newest is kept"
    await cache.get((0, ("t", 0), 0), build)
    assert built == 1001, "the oldest is not"
