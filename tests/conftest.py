"""Settings of the whole suite.

Fixtures live beside the tests that use them (`tests/<part>/conftest.py`); brokers in `tests/brokers/fixtures.py`.
"""

import functools
import os

import pytest
from hypothesis import HealthCheck, settings

# No deadline: two busy cores make any single example slow now and then. In CI the examples are the same every time, so
# that a red build is about the change that it builds; at home they are new ones every time.
settings.register_profile(
    "sluice",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sluice")


BROKER_FIXTURES = ("mqtt_broker", "kafka_broker", "own_kafka_broker", "kafka_behind_proxy")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that asks for both kinds of brokers runs with the embedded pair and with the real pair.

    The mixed pairs would double the time of the integration tests, and no deployment has one.
    """
    mixed = [item for item in items if _is_mixed(item)]
    items[:] = [item for item in items if item not in set(mixed)]
    config.hook.pytest_deselected(items=mixed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `gpu` runs where there is one; only then is it asked, so that other tests load no PyTorch."""
    if item.get_closest_marker("gpu") and (missing := _why_no_gpu()):
        pytest.skip(missing)


@functools.cache
def _why_no_gpu() -> str:
    """Empty when CUDA tests can run."""
    try:
        import torch
    except ImportError as error:
        return f"needs a CUDA device: {error}"
    return "" if torch.cuda.is_available() else "needs a CUDA device: PyTorch sees none here"


def _is_mixed(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    real = {getattr(params[name], "durable", None) for name in BROKER_FIXTURES if name in params}
    return len(real) > 1
