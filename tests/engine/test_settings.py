"""`sluice engine`: what --set says, beside the options of their own."""

import pytest

from engine.bench import section
from sluice.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "setting", "option"),
    [
        ({"model": "one"}, "model=other", "--model one"),
        ({"model": "one"}, "engine.model = other", "--model one"),
        ({"device": "cpu"}, "device=cuda", "--device cpu"),
        ({"threads": 2}, "threads=1", "--threads 2"),
    ],
)
def test_a_setting_that_contradicts_an_option_is_refused_with_both_names(
    options: dict[str, object], setting: str, option: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        section(options, [setting])
    assert repr(setting) in str(refused.value)
    assert option in str(refused.value)


def test_a_setting_may_say_what_an_option_says_or_what_none_was_given_for() -> None:
    assert section({"model": "one"}, ["model=one"]).model == "one"
    untouched = {"model": None, "device": "auto", "precision": "auto", "threads": 0}
    config = section(untouched, ["device=cpu", "threads=3", "model=other", "models.ner.model=third"])
    assert (config.device, config.threads, config.model) == ("cpu", 3, "other")
    assert section({"threads": 3}, ["threads=3"]).threads == 3
    assert section({"model": "one"}, ["models.ner.model=third"]).model == "one"
