"""Finding and reading models; damaged and missing ones."""

import json
import shutil
from pathlib import Path

import pytest

from engine import models
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.models import ModelCard
from sluice.errors import Permanent


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["head"], tmp_path / "model"))


def test_the_default_model_is_found_in_its_package_without_a_network(minilm: ModelCard) -> None:
    assert (minilm.kind, minilm.length_max, minilm.pooling, minilm.labels) == ("embedding", 256, "mean", ())
    assert minilm.folder.is_dir()
    assert len(minilm.version) == 12


@pytest.mark.parametrize("name", ["someone/some-model", "no-such-package", "numpy", "../nowhere", "a//b"])
def test_a_model_that_is_nowhere_is_named_with_the_ways_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Permanent) as error:
        models.locate(name, allow_download=False)
    for part in (f"'{name}'", "engine.model", "pip install", "hf download", "allow_download"):
        assert part in str(error.value)


def test_a_folder_says_kind_labels_limits_and_pooling(tiny_models: dict[str, Path]) -> None:
    cards = {name: models.read_card(name, folder) for name, folder in tiny_models.items()}
    assert cards["head"].kind == "classification"
    assert cards["head"].labels == ("low", "middle", "high")
    assert cards["bert"].length_max == 48
    assert cards["roberta"].length_max == 46
    assert cards["bert-cls"].pooling == "cls"
    assert len({card.version for card in cards.values()}) == len(cards)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "not a model folder: it has no config.json"),
        ("config.json", "{broken", "config.json: damaged"),
        ("config.json", "[]", "not a JSON object"),
        ("model.safetensors", None, "no safetensors weights"),
        ("tokenizer.json", "{}", "cannot load the tokenizer"),
        ("model.safetensors", "junk", "cannot load the weights"),
    ],
)
def test_a_damaged_folder_is_refused_naming_what_is_wrong(
    folder: Path, file: str, content: str | None, message: str
) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(Permanent, match=message):
        open_all(folder)


def open_all(folder: Path) -> None:
    card = models.read_card("m", folder)
    models.load_tokenizer(card)
    models.load_model(card)


def test_missing_weights_are_an_error_and_not_random_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Permanent, match=r"lacks 1 weights, first classifier.weight"):
        models.load_model(models.read_card("m", folder))


def test_the_version_changes_with_weights_tokenizer_and_configuration(folder: Path) -> None:
    versions = [models.read_card("m", folder).version]
    for file in ("config.json", "tokenizer.json"):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "note": 1}))
        versions.append(models.read_card("m", folder).version)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    versions.append(models.read_card("m", folder).version)
    assert len(set(versions)) == 4


def test_loading_prints_nothing(tiny_models: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    card = models.read_card("m", tiny_models["head"])
    models.load_tokenizer(card)
    models.load_model(card)
    assert capfd.readouterr() == ("", "")


def test_the_default_is_the_packaged_model() -> None:
    assert EngineConfig().model == DEFAULT_MODEL
