"""A model folder that is damaged, or of something else: one clear error that names the file and the way out."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.config import EngineConfig
from engine.loading import load
from engine.model_place import locate
from sluice.errors import Permanent, SluiceError

Harm = Callable[[Path], Any]
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["bert"], tmp_path / "model"))


def open_model(folder: Path) -> None:
    section = EngineConfig(
        model=str(folder), device="cpu", precision="fp32", threads=1, workers=1, backend="torch", fit_seconds_max=0.01
    )
    load(section).close()


def directory(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return harm


def link(name: str, target: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return harm


def fifo(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return harm


def text(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content)


def stating(name: str, **changes: Any) -> Harm:
    """With other values in a JSON file, which may be missing."""

    def harm(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, **changes}))

    return harm


def weights(change: Callable[[dict[str, Any]], Any]) -> Harm:
    """With other weights in place."""

    def harm(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS, metadata={"format": "pt"})

    return harm


def _not_numbers(content: dict[str, Any]) -> None:
    for weight in content.values():
        weight.fill_(float("nan"))


def _wide(content: dict[str, Any]) -> None:
    import torch

    name = "encoder.layer.0.intermediate.dense.weight"
    content[name] = torch.zeros(7, 32)


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        change(content)
        (folder / TOKENIZER).write_text(json.dumps(content))

    return harm


def _larger(content: dict[str, Any]) -> None:
    """Of another model: its words have numbers that this one does not know."""
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: i + 5000 * (i > 3) for word, i in words.items()}


FILES: list[tuple[Harm, str]] = [
    (directory(WEIGHTS), r"model\.safetensors: cannot be read: a directory; .*copy or download"),
    (link(WEIGHTS, "nowhere"), r"model\.safetensors: cannot be read: a link to nothing; .*copy or download"),
    (link(WEIGHTS, WEIGHTS), r"model\.safetensors: cannot be read: a link to nothing; .*copy or download"),
    (fifo(WEIGHTS), r"model\.safetensors: cannot be read: neither a file nor a directory; .*copy or download"),
    (text(WEIGHTS, ""), r"model\.safetensors: damaged .*; copy or download"),
    (directory(TOKENIZER), r"tokenizer\.json: cannot be read: a directory; .*copy or download"),
    (fifo(TOKENIZER), r"tokenizer\.json: cannot be read: neither a file nor a directory; .*copy or download"),
    (directory(CONFIG), r"config\.json: cannot be read: a directory; .*copy or download"),
    (fifo(CONFIG), r"config\.json: cannot be read: neither a file nor a directory; .*copy or download"),
    (text(CONFIG, "[" * 100_000), r"config\.json: damaged: .*; copy or download"),
    (text("tokenizer_config.json", "[]"), r"tokenizer_config\.json: damaged: not a JSON object; copy or download"),
    (
        stating("tokenizer_config.json", model_max_length=[1]),
        r"tokenizer_config\.json: damaged: model_max_length is no",
    ),
    (
        stating("sentence_bert_config.json", max_seq_length="x"),
        r"sentence_bert_config\.json: damaged: max_seq_length is",
    ),
    (stating("model.safetensors.index.json", weight_map=[1]), r"index\.json: damaged: weight_map is no JSON object"),
]
CONTENT: list[tuple[Harm, str]] = [
    (weights(_not_numbers), "not finite .* damaged, copy or download"),
    (
        weights(_wide),
        r"encoder\.layer\.0\.intermediate\.dense\.weight has the shape \(7, 32\), and config.json asks for",
    ),
    (weights(dict.clear), r"lacks \d+ weights, first "),
    (_tokenizer(_larger), r"tokenizer\.json is of another model: it gives token 50\d\d, and this one knows 64; copy"),
    (
        _tokenizer(lambda content: content["model"]["vocab"].clear()),
        "cannot load the tokenizer from .*; copy or download",
    ),
    (
        _tokenizer(lambda content: content["model"].update(unk_token="[NONE]")),
        "cannot load the tokenizer from .*; copy or download",
    ),
    (_tokenizer(lambda content: content.update(model=None)), "cannot load the tokenizer from .*; copy or download"),
]


@pytest.mark.parametrize(("harm", "message"), [*FILES, *CONTENT])
def test_what_is_damaged_is_named_with_the_way_out(folder: Path, harm: Harm, message: str) -> None:
    harm(folder)
    with pytest.raises(Permanent, match=message) as error:
        open_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_of_images_is_no_model_of_texts(tmp_path: Path, folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**shape, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vit")
    for name in (TOKENIZER, "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "vit" / name)
    with pytest.raises(Permanent, match=r"cannot be run .*no model of texts"):
        open_model(tmp_path / "vit")


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 2.5, float("inf"), True])
def test_any_value_in_its_configuration_is_right_or_refused(folder: Path, value: Any) -> None:
    """Each key in turn; what transformers takes, we take."""
    whole = json.loads((folder / CONFIG).read_text())
    for key in whole:
        (folder / CONFIG).write_text(json.dumps({**whole, key: value}))
        try:
            models.load_model(models.read_card("m", folder))
        except SluiceError as error:
            assert str(folder) in str(error) or "'m'" in str(error)  # noqa: PT017 - what is not damaged opens


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/model", "__main__", "a\0b", ""])
def test_a_name_that_cannot_be_one_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Permanent) as error:
        models.read_card(name, locate(name, allow_download=False))
    assert len(str(error.value)) < 12_000
