"""Small models with random weights: real folders in Hugging Face layout, in a fraction of a second."""

import json
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "disk",
    "memory",
    "link",
    "user",
    "login",
    "failed",
    "is",
    "ok",
    "full",
    "lost",
    "error",
    "started",
    "stopped",
    "of",
    "on",
    "to",
    "and",
    "in",
]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}


def build_all(root: Path) -> dict[str, Path]:
    """Folders by name: `bert`, `bert-cls`, `head`, `distilbert`, `roberta`."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    torch.manual_seed(7)
    three = {"id2label": {0: "low", 1: "middle", 2: "high"}, "label2id": {"low": 0, "middle": 1, "high": 2}}
    made: dict[str, Any] = {
        "bert": BertModel(BertConfig(**SHAPE)),
        "bert-cls": BertModel(BertConfig(**SHAPE)),
        "head": BertForSequenceClassification(BertConfig(**SHAPE, **three)),
        "distilbert": DistilBertModel(
            DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=48)
        ),
        "roberta": RobertaForSequenceClassification(RobertaConfig(**SHAPE, **three, pad_token_id=0)),
    }
    folders = {}
    for name, model in made.items():
        _widen(model)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        _save_tokenizer(folders[name])
    pooling = folders["bert-cls"] / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return folders


def _widen(model: Any) -> None:
    """Fresh weights are so small that all texts look alike: make them larger, so that a wrong mask shows."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embeddings" not in name:
                weight.mul_(8)
            elif weight.ndim == 2:
                weight.mul_(20)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{word: i + 4 for i, word in enumerate(WORDS)}}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(folder)
