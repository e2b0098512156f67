"""The agent stays small: what it loads, and what it takes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ["torch", "transformers", "confluent_kafka", "pyarrow", "grpc", "numpy", "deltalake", "hyperscan", "duckdb"]
MODULES = [
    "edge", "edge.agent", "edge.cli", "edge.spool_cli", "edge.sources.tail", "edge.sources.host",
    "edge.sources.stdin", "edge.sources.generator",
]  # fmt: skip


def test_the_agent_loads_nothing_heavy() -> None:
    program = f"import sys, {', '.join(MODULES)}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_at_all() -> None:
    program = "import sys, edge\nprint([m for m in sys.modules if m.startswith(('edge.', 'sluice', 'paho', 'google'))])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "edge." not in done.stdout
    assert "paho" not in done.stdout
