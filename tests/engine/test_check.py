"""`--check`: what is wrong with the configured models is said without loading them; and which key it is about."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from central.cli import central
from engine import models
from engine.check import check_models
from engine.config import EngineConfig, GenerationConfig, ModelConfig
from gateway.cli import gateway
from sluice.errors import ConfigError, Permanent


def section(model: Path | str, generation: Path | str = "", **more: Path | str) -> EngineConfig:
    further = {name: ModelConfig(model=str(each)) for name, each in more.items()}
    return EngineConfig(
        model=str(model),
        models=further,
        generation=GenerationConfig(model=str(generation)),
        device="cpu",
        fit_seconds_max=0.1,
    )


def test_each_model_is_told_with_its_folder_and_tasks(
    tiny_models: dict[str, Path], generative: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_weights", None)  # nothing is loaded
    config = section(tiny_models["head"], generative["llama"], ner=tiny_models["ner"])
    assert check_models(config, "tokens", key="analysis.task") == [
        f"model default: {tiny_models['head']}, offers classify, embed, novelty",
        f"model ner: {tiny_models['ner']}, offers tokens",
        f"model generation: {generative['llama']}, offers generate",
    ]


def test_a_task_that_no_model_offers_is_named_with_its_key(tiny_models: dict[str, Path]) -> None:
    config = section(tiny_models["bert"], ner=tiny_models["ner"])
    with pytest.raises(ConfigError, match=r"^analysis.task: 'summary' is not offered: 'default' offers .*'ner' offers"):
        check_models(config, "summary", key="analysis.task")
    with pytest.raises(ConfigError, match=r"^analysis.task: 'embed' is not offered: 'ner' offers tokens$"):
        check_models(config, "embed", "ner", "analysis.task")


def test_a_model_in_a_place_of_another_kind_is_refused(
    tiny_models: dict[str, Path], generative: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"engine\.models\.ner\.model: .* offers generate: .* engine\.generation"):
        check_models(section(tiny_models["bert"], ner=generative["llama"]))
    with pytest.raises(ConfigError, match=r"engine\.generation\.model: .* offers tokens: .* engine\.models"):
        check_models(section(tiny_models["bert"], tiny_models["ner"]))


def test_a_model_that_is_to_be_downloaded_is_no_error() -> None:
    config = EngineConfig(model="someone/absent-model", allow_download=True)
    (line,) = check_models(config, "anything", key="analysis.task")
    assert "someone/absent-model comes from the hub" in line
    with pytest.raises(Permanent, match="no such folder"):
        check_models(EngineConfig(model="/nope/model", allow_download=True))


def test_a_folder_without_a_tokenizer_is_refused_as_at_the_start(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["bert"], tmp_path / "model")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    (tmp_path / "model" / "vocab.txt").unlink(missing_ok=True)
    with pytest.raises(Permanent, match="tokenizer"):
        check_models(section(tmp_path / "model"))


@pytest.mark.parametrize(
    ("command", "head"),
    [(central, 'roles = ["analysis"]\n'), (central, 'roles = ["feed"]\n'), (gateway, 'site = "s"\n')],
)
def test_check_of_a_part_looks_at_its_models(
    command: click.Command, head: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    def run(model: Path | str) -> Any:
        file = tmp_path / "part.toml"
        file.write_text(f'{head}[engine]\nmodel = "{tiny_models["bert"]}"\n[engine.models.ner]\nmodel = "{model}"\n')
        return CliRunner().invoke(command, ["--config", str(file), "--check"])

    shown = run(tiny_models["ner"])
    assert shown.exit_code == 0, shown.output
    assert f"model ner: {tiny_models['ner']}, offers tokens" in shown.stdout
    shown = run("/nope")
    assert isinstance(shown.exception, Permanent)
    assert "set engine.models.ner.model to" in str(shown.exception)
    damaged = Path(shutil.copytree(tiny_models["ner"], tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"junk")
    assert "model.safetensors: damaged" in str(run(damaged).exception)
    (damaged / "config.json").write_text("{")
    assert "config.json: damaged" in str(run(damaged).exception)


@pytest.mark.parametrize("part", ['site = "s"\n[local.analysis]\nenabled = false\n', 'roles = ["lake"]\n'])
def test_models_that_are_not_needed_are_not_looked_at(part: str, tmp_path: Path) -> None:
    file = tmp_path / "part.toml"
    file.write_text(f'{part}[engine]\nmodel = "/nope"\n')
    command = gateway if "site" in part else central
    shown = CliRunner().invoke(command, ["--config", str(file), "--check"])
    assert shown.exit_code == 0, shown.output
    assert "model default" not in shown.stdout


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({}, "engine.model"),
        ({"ner": "/nope"}, "engine.models.ner.model"),
        ({"generation": "/nope"}, "engine.generation.model"),
    ],
)
async def test_an_engine_that_cannot_start_names_the_key_of_the_model(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path], more: dict[str, str], key: str
) -> None:
    with pytest.raises(Permanent, match=rf"'/nope' was not found.* set {key} to"):
        await open_engine(section(tiny_models["bert"] if more else "/nope", **more))


async def test_labels_that_a_model_does_not_read_do_not_open_it_anew(
    open_engine: Callable[..., Any], tiny_models: dict[str, Path]
) -> None:
    from msgspec.structs import replace

    labels = {"good": ("ok",), "bad": ("failed",)}
    config = section(tiny_models["bert"], ner=tiny_models["ner"], head=tiny_models["head"], other=tiny_models["mpnet"])
    engine = await open_engine(config)
    assert await engine.reload(replace(config, labels=labels)) == ["default", "other"]
    own = {**config.models, "other": ModelConfig(model=str(tiny_models["mpnet"]), labels=dict(config.labels))}
    assert await engine.reload(replace(config, labels=labels, models=own)) == ["other"]
    await engine.swap("head", str(tiny_models["bert"]))
    (found,) = await engine.analyze(["the disk is ok"], model="head")
    assert found.label in labels, "which it reads now"
