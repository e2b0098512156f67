"""`sluice engine`, and what importing the engine costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli import engine

HEAVY = "torch, transformers, numpy, tokenizers, diskcache, prometheus_client"


@pytest.mark.parametrize("module", ["engine", "engine.cli", "engine.config"])
def test_importing_the_command_line_and_configuration_is_light(module: str) -> None:
    program = f"import sys, {module}; print([m for m in '{HEAVY}'.split(', ') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_importing_the_service_loads_no_torch() -> None:
    program = "import sys, engine.service; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_plan_shows_what_was_chosen_and_why(tiny_models: dict[str, Path]) -> None:
    folder = str(tiny_models["bert"])
    result = CliRunner().invoke(engine, ["plan", "--model", folder, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert {"model", "device", "threads", "precision", "buckets", "cost", "batch_tokens", "memory"} <= plan.keys()
    assert folder in plan["model"]
    assert "configured" in plan["device"]


def test_bench_prints_its_figures_as_json(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.log"
    texts.write_text("".join(f"the disk is full {'error ' * (i % 30)}\n\n" for i in range(200)))
    arguments = ["bench", "--model", str(tiny_models["bert"]), "--texts", str(texts), "--seconds", "1", "--json"]
    result = CliRunner().invoke(engine, [*arguments, "--device", "cpu", "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    for key in ("texts_per_s", "tokens_per_s", "p50_ms", "p99_ms"):
        assert figures[key] > 0
    assert 0 <= figures["padding_share"] < 0.5
    assert 0 < figures["device_busy_share"] <= 1.05
    assert figures["p50_ms"] <= figures["p99_ms"]


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    empty = tmp_path / "empty.log"
    empty.write_text("\n\n")
    result = CliRunner().invoke(engine, ["bench", "--texts", str(empty)])
    assert "no texts" in str(result.exception)
