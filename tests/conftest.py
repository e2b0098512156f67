"""Settings of the whole suite.

Fixtures live beside the tests that use them (`tests/<part>/conftest.py`); brokers in `tests/brokers/fixtures.py`.
"""

import os

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
