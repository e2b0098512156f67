"""What sentence-transformers' files ask for is done, or refused: never vectors that look right and are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import models
from engine.config import EngineConfig
from engine.loading import load
from sluice.errors import Permanent

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.base.modules.any."


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models["bert"], tmp_path / "model"))


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def modules(*names: str, pooling: str = "1_Pooling") -> list[dict[str, Any]]:
    return [{"idx": i, "path": pooling if "Pooling" in name else "", "type": name} for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_mean_and_cls_are_taken_in_every_spelling(folder: Path, config: dict[str, Any], pooling: str) -> None:
    write(folder / "modules.json", modules(OLD + "Transformer", OLD + "Pooling", NEW + "Normalize", pooling="2_Own"))
    write(folder / "2_Own" / "config.json", config)
    assert models.read_card("m", folder).pooling == pooling


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_other_poolings_are_refused_by_name(folder: Path, config: dict[str, Any], named: str) -> None:
    write(folder / "1_Pooling" / "config.json", config)
    with pytest.raises(Permanent, match=rf"1_Pooling/config\.json: the model pools by {named}, .*Choose a model"):
        models.read_card("m", folder)


@pytest.mark.parametrize("module", [OLD + "Dense", OLD + "CNN", NEW + "SpladePooling", "custom_st.Transformer", "x"])
def test_a_module_that_would_be_left_out_is_refused_by_name(folder: Path, module: str) -> None:
    write(folder / "modules.json", modules(OLD + "Transformer", OLD + "Pooling", module))
    with pytest.raises(Permanent, match=rf"modules\.json: the model has a module '{module}', .*Choose a model"):
        models.read_card("m", folder)


@pytest.mark.parametrize("content", [{}, ["x"], "x"])
def test_modules_that_are_none_are_damage(folder: Path, content: Any) -> None:
    write(folder / "modules.json", content)
    with pytest.raises(Permanent, match=r"modules\.json: damaged: not a JSON list of objects"):
        models.read_card("m", folder)


def test_a_prompt_for_every_text_is_refused_with_the_way_out(folder: Path) -> None:
    config = {"prompts": {"query": "query: ", "none": ""}, "default_prompt_name": "query"}
    write(folder / "config_sentence_transformers.json", config)
    with pytest.raises(Permanent, match=r"'query: ' in front of every text .*Set default_prompt_name to null"):
        models.read_card("m", folder)
    write(folder / "config_sentence_transformers.json", {**config, "default_prompt_name": "none"})
    assert models.read_card("m", folder).kind == "embedding"


def test_prompts_that_callers_add_are_told(folder: Path) -> None:
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "passage": "passage: "}})
    loaded = load(EngineConfig(model=str(folder), device="cpu", precision="fp32", threads=1, fit_seconds_max=0.01))
    loaded.close()
    assert "none is added: the model knows query, passage" in loaded.reasons["prompts"]


@pytest.mark.parametrize(
    ("architecture", "taken"),
    [
        ("BertModel", True),
        ("BertForMaskedLM", True),
        ("BertForPreTraining", True),
        ("RoFormerModel", True),
        ("BertForQuestionAnswering", False),
        ("BertForMultipleChoice", False),
        ("BertForNextSentencePrediction", False),
    ],
)
def test_a_model_of_another_task_is_no_embedder(folder: Path, architecture: str, taken: bool) -> None:
    write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), "architectures": [architecture]})
    if not taken:
        with pytest.raises(Permanent, match=rf"config\.json: a model of the architecture {architecture} is not made"):
            models.read_card("m", folder)
        write(folder / "modules.json", modules(OLD + "Transformer", OLD + "Pooling"))  # an embedder was made of it
    assert models.read_card("m", folder).kind == "embedding"


@pytest.mark.parametrize("own", [True, False])
def test_texts_are_put_into_lower_case_when_the_model_wants_it(folder: Path, own: bool) -> None:
    def ids(*, wanted: bool) -> list[list[int]]:
        write(folder / "sentence_bert_config.json", {"max_seq_length": 46, "do_lower_case": wanted})
        tokenizer = models.load_tokenizer(models.read_card("m", folder))
        return [each.ids for each in tokenizer.encode_batch(["Disk FULL", "disk full"])]

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    write(file, {**content, "normalizer": {"type": "NFC"} if own else None})
    upper, lower = ids(wanted=True)
    assert upper == lower
    upper, lower = ids(wanted=False)
    assert upper != lower
