"""Fixtures of the kernel's tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.brokers.fixtures import mqtt_broker, mqtt_proxy  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def python() -> Callable[[str], str]:
    """Runs a program in a fresh interpreter in the repository's root; returns its output, fails with its errors."""

    def run(program: str) -> str:
        # From stdin: a program that carries a bomb is larger than an argument may be.
        command = [sys.executable, "-"]
        done = subprocess.run(command, input=program, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
