"""`sluice engine`, and what importing the engine costs."""

import json
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from engine.bench import read_texts, section, without_caches
from engine.bench_report import bars, histogram
from engine.cli import engine
from sluice.errors import ConfigError, Permanent

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
    assert (plan["models"], plan["generation"]) == ({}, {})


def bench(*arguments: str, model: Path, texts: Path) -> Result:
    fixed = ["--device", "cpu", "--precision", "fp32", "--seconds", "1", "--set", "fit_seconds_max=0.2"]
    return CliRunner().invoke(engine, ["bench", "--model", str(model), "--texts", str(texts), *fixed, *arguments])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.log"
    file.write_text("".join(f"the disk is full {'error ' * (i % 30)}\n\n" for i in range(200)))
    return file


def test_plan_for_people_is_aligned_and_folds_long_reasons(tiny_models: dict[str, Path]) -> None:
    folder = str(tiny_models["bert"])
    result = CliRunner().invoke(engine, ["plan", "--model", folder, "--device", "cpu"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert {"model", "tokenizer", "buckets", "cost"} <= set(names)
    start = {line.index(line.split(maxsplit=1)[1]) for line in lines if not line.startswith(" ")}
    assert len(start) == 1, "reasons begin in one column"
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines if folder not in line)


def test_plan_shows_every_model_under_its_name(tiny_models: dict[str, Path], generative: dict[str, Path]) -> None:
    folders = [str(tiny_models["bert"]), str(tiny_models["ner"]), str(generative["llama"])]
    arguments = ["plan", "--model", folders[0], "--device", "cpu", "--set", "fit_seconds_max=0.2"]
    arguments += ["--set", f"models.ner.model={folders[1]}", "--set", f"generation.model={folders[2]}"]
    result = CliRunner().invoke(engine, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    plans = (plan, plan["models"]["ner"], plan["generation"])
    assert all(folder in each["model"] for folder, each in zip(folders, plans, strict=True))
    assert {"cost", "buckets"} <= plan.keys()
    assert {"cost", "buckets"} <= plan["models"]["ner"].keys()
    assert plan["generation"]["batching"].startswith("continuous")
    result = CliRunner().invoke(engine, arguments, env={"COLUMNS": "100"})
    lines = result.stdout.splitlines()
    assert [line for line in lines if re.fullmatch(r"ner|generation", line)] == ["ner", "generation"]
    for title, folder in (("ner", folders[1]), ("generation", folders[2])):
        following = lines[lines.index(title) + 1]
        assert following.startswith("  model "), following
        assert folder in "".join(lines[lines.index(title) :])


def test_bench_prints_its_figures_as_json(tiny_models: dict[str, Path], texts: Path) -> None:
    result = bench("--json", model=tiny_models["bert"], texts=texts)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    for key in ("texts_per_s", "tokens_per_s", "p50_ms", "p99_ms"):
        assert figures[key] > 0
    assert 0 <= figures["padding_share"] < 0.5
    assert 0 < figures["device_busy_share"] <= 1.05
    assert figures["p50_ms"] <= figures["p99_ms"]
    assert (figures["texts"], figures["texts_failed"]) == (200, 0)
    assert (figures["task"], figures["load"]) == ("classify", 0.5)
    assert figures["chosen"]["precision"].startswith("fp32")
    assert result.stderr == "", "no progress where there is no terminal"


def test_bench_takes_the_task_that_the_model_offers(tiny_models: dict[str, Path], texts: Path) -> None:
    result = bench(model=tiny_models["ner"], texts=texts)
    assert result.exit_code == 0, result.output
    assert re.search("^task +tokens$", result.stdout, re.MULTILINE), result.stdout
    assert re.search("^chosen +device cpu.*precision fp32", result.stdout, re.MULTILINE)
    wrong = bench("--task", "classify", model=tiny_models["ner"], texts=texts)
    assert isinstance(wrong.exception, Permanent)
    assert "it offers tokens" in str(wrong.exception)


def test_bench_shows_figures_and_bars_and_counts_what_it_could_not_analyse(
    tiny_models: dict[str, Path], texts: Path
) -> None:
    with texts.open("a") as file:
        file.write("x" * 70_000 + "\n" + "y" * 2_500_000 + "\n")
    result = bench("--caches", model=tiny_models["bert"], texts=texts)
    assert result.exit_code == 0, result.output
    shown = re.search(r"^texts +204 in .* s: 30 computed .* 4 failed, \d+ truncated$", result.stdout, re.MULTILINE)
    assert shown, result.stdout
    assert re.search(r"^ +≤ [\d.e+]+ ms █+.* \d+$", result.stdout, re.MULTILINE)
    assert re.search(r"^ +up to 32 .*\d+$", result.stdout, re.MULTILINE)


def test_bench_draws_a_picture_or_says_what_is_missing(
    tiny_models: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "latency.png"
    if find_spec("matplotlib") is not None:
        result = bench("--plot", str(picture), model=tiny_models["bert"], texts=texts)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")
        for name in ("latency.nonsense", "latency"):
            wrong = bench("--plot", str(tmp_path / name), model=tiny_models["bert"], texts=texts)
            assert "its ending must be one of" in str(wrong.exception)
    nowhere = bench("--plot", str(tmp_path / "no" / "such.png"), model=tiny_models["bert"], texts=texts)
    monkeypatch.setattr("engine.bench_report.find_spec", lambda _: None)
    missing = bench("--plot", str(picture), model=tiny_models["bert"], texts=texts)
    assert isinstance(missing.exception, ConfigError)
    assert "pip install matplotlib" in str(missing.exception)
    assert "" == nowhere.stdout == missing.stdout, "it is said before anything is measured"
    assert nowhere.exit_code != 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no texts"),
        (b"\n \n\t\n", "no texts"),
        (b"\x7fELF\x02\x01\0\0 binary", "not a text file: a zero byte at position 6"),
        ("fünf".encode("utf-16"), "UTF-16"),
        (bytes(range(128, 256)) * 4, "not UTF-8"),
    ],
)
def test_a_file_without_texts_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "file.log"
    file.write_bytes(content)
    result = CliRunner().invoke(engine, ["bench", "--texts", str(file)])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert "file.log" in str(result.exception)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(engine, ["bench", "--texts", str(tmp_path / "none.log")])
    assert result.exit_code == 2
    assert "none.log" in result.stderr
    with pytest.raises(ConfigError, match="Is a directory"):
        read_texts(tmp_path, 10)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("no-sign", "key=value"),
        ("worker=2", "did you mean"),
        ("chunk_texts=many", "chunk_texts"),
        ("caches.no_such=1", "unknown key 'caches.no_such'"),
        ("model.x=1", "no section"),
        ("ladder=[8, 16", "TOML"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        section({"model": "m"}, [setting])


def test_settings_reach_the_configuration() -> None:
    config = section(
        {"model": "m", "threads": 2, "device": None},
        ["chunk_texts=7", "engine.caches.token_bytes_max=5", "engine.ladder=[8, 16]"],
    )
    assert (config.model, config.threads, config.device, config.chunk_texts) == ("m", 2, "auto", 7)
    assert (config.caches.token_bytes_max, config.ladder) == (5, (8, 16))
    caches = without_caches(section({})).caches
    assert (caches.token_bytes_max, caches.result_bytes_max) == (0, 0)


def test_an_interrupted_measurement_ends_with_one_word_and_no_traceback(
    tiny_models: dict[str, Path], texts: Path
) -> None:
    arguments = ["bench", "--model", str(tiny_models["bert"]), "--texts", str(texts), "--device", "cpu"]
    program = (
        "import sys; from engine.cli import engine; import engine.bench as b; old = b._open_loop\n"
        "def begun(*a):\n    print('begun', flush=True)\n    return old(*a)\n"
        "b._open_loop = begun; engine(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--seconds", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip() == "Aborted!"


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_every_latency_is_in_one_class_of_the_histogram(values: list[float]) -> None:
    rows = histogram(values)
    assert sum(count for _, count in rows) == len(values)
    assert len(rows) <= 12


def test_bars_are_in_proportion_and_what_is_there_shows() -> None:
    lines = list(bars([("a", 1000), ("b", 500), ("c", 1), ("d", 0)], 20))
    assert [line.count("█") for line in lines] == [20, 10, 0, 0]
    assert "▏" in lines[2]
    assert [line.split()[-1] for line in lines] == ["1,000", "500", "1", "0"]
    assert list(bars([("a", 0)], 20)) == ["  nothing was measured"]
