"""Finding and reading models; damaged and missing ones."""

import json
import shutil
from pathlib import Path

import pytest

from engine import models
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.model_place import locate
from engine.models import ModelCard
from sluice.errors import Permanent


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["head"], tmp_path / "model"))


def test_the_default_model_is_found_in_its_package_without_a_network(minilm: ModelCard) -> None:
    assert (minilm.kind, minilm.length_max, minilm.pooling, minilm.labels) == ("embedding", 256, "mean", ())
    assert minilm.folder.is_dir()
    assert len(minilm.version) == 12


@pytest.mark.parametrize("name", ["someone/some-model", "no-such-package", "numpy", "a//b"])
def test_a_model_that_is_nowhere_is_named_with_the_ways_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Permanent) as error:
        locate(name, allow_download=False)
    for part in (f"'{name}'", "engine.model", "pip install", "hf download", "allow_download"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["../nowhere", "/nope/model", "~/no-such-model"])
def test_a_folder_that_is_nowhere_is_no_package_and_not_on_the_hub(name: str) -> None:
    with pytest.raises(Permanent, match=f"'{name}' was not found: no such folder; set engine.model to") as error:
        locate(name, allow_download=False)
    assert "hf download" not in str(error.value)


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
        ("config.json", "\x00\xff", "config.json: damaged"),
        ("config.json", '{"architectures": "nothing"}', "names the architecture None, which transformers .* Upgrade"),
        ("tokenizer.json", "{}", "cannot load the tokenizer"),
        ("tokenizer.json", "{broken", "cannot load the tokenizer"),
        ("tokenizer.json", None, "cannot load the tokenizer from .*: it has no tokenizer.json; copy or download it"),
        ("model.safetensors", "junk", "cannot load the weights: .*model.safetensors: damaged .*download the model"),
        ("model.safetensors", "", "cannot load the weights: .*model.safetensors: damaged"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "Git LFS pointer .*git lfs pull"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no-such-model"}, "architecture 'no-such-model', which transformers .* does not know"),
        ({"architectures": ["OwnForSequenceClassification"], "auto_map": {"AutoModel": "own.Own"}}, "never run"),
        ({"id2label": {"zero": "x"}}, "config.json: damaged: .*copy or download the model again"),
        ({"id2label": {"1": "x", "2": "y"}}, "config.json: damaged: id2label does not name the labels 0, 1, 2"),
        ({"max_position_embeddings": "many"}, "config.json: damaged"),
        ({"hidden_size": 33}, "cannot load the weights"),
        ({"architectures": ["BertForTokenClassification"], "num_hidden_layers": 5}, r"lacks \d+ weights"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(Permanent, match=message) as error:
        open_all(folder)
    assert str(folder) in str(error.value) or "'m'" in str(error.value)


@pytest.mark.parametrize("kept", [4, 200, -64])
def test_weights_that_were_cut_short_are_named(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(Permanent, match=r"model\.safetensors: damaged \(.*\); copy or download the model again"):
        open_all(folder)


def test_a_missing_part_of_the_weights_is_named(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"classifier.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Permanent, match=r"model-00002-of-00002\.safetensors is missing"):
        open_all(folder)


def test_code_beside_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps(config))
    open_all(folder)  # transformers knows the architecture: its own code is used
    assert not witness.exists()


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertModel", "embedding"),
        ("BertForMaskedLM", "embedding"),
        ("BertForTokenClassification", "tokens"),
        ("GPT2LMHeadModel", "generation"),
        ("LlamaForCausalLM", "generation"),
        ("Glm4vForConditionalGeneration", "generation"),
        ("T5ForConditionalGeneration", "generation"),
    ],
)
def test_the_kind_follows_from_the_architecture(folder: Path, architecture: str, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    assert models.read_card("m", folder).kind == kind
    (folder / "modules.json").write_text("[]")  # sentence-transformers made an embedding model of it
    assert models.read_card("m", folder).kind == ("embedding" if kind == "generation" else kind)


def test_a_generative_model_is_no_encoder(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(Permanent, match=r"generates text \(LlamaForCausalLM\): it offers generate, and none of embed"):
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
