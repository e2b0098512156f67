"""A topic names its site, device and channel, and nothing else is a topic of ours."""

import pytest

from sluice import topics
from sluice.errors import Permanent


@pytest.mark.parametrize("channel", sorted(topics.CHANNELS))
def test_a_topic_is_parsed_into_what_it_was_made_of(channel: str) -> None:
    name = topics.topic("site-1", "device-1", channel)
    assert name == f"sluice/v1/site-1/device-1/{channel}"
    assert topics.parse(name) == ("site-1", "device-1", channel)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "sluice/v1/s/d",
        "sluice/v1/s/d/up/x",
        "sluice/v2/s/d/up",
        "other/v1/s/d/up",
        "sluice/v1/s/d/down",
        "sluice/v1//d/up",
        "sluice/v1/s//up",
        "sluice/v1/+/d/up",
        "sluice/v1/s/#/up",
        "/sluice/v1/s/d/up",
        "sluice/v1/s/..\0/up",
    ],
)
def test_what_is_not_ours_is_refused(name: str) -> None:
    with pytest.raises(Permanent):
        topics.parse(name)
