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


# Labels of the models for `tokens`: with and without prefixes, and nothing.
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


def build_all(root: Path) -> dict[str, Path]:
    """Folders by name; `ner` and `ner-bytes` are for the task `tokens`."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
        MPNetConfig,
        MPNetModel,
        RobertaConfig,
        RobertaForSequenceClassification,
        RobertaForTokenClassification,
    )

    torch.manual_seed(7)
    three = {"id2label": {0: "low", 1: "middle", 2: "high"}, "label2id": {"low": 0, "middle": 1, "high": 2}}
    entities = {"id2label": dict(enumerate(ENTITIES)), "label2id": {label: i for i, label in enumerate(ENTITIES)}}
    made: dict[str, Any] = {
        "one-label": BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)),
        "multi-label": BertForSequenceClassification(
            BertConfig(**SHAPE, **three, problem_type="multi_label_classification")
        ),
        "regression": BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1, problem_type="regression")),
        "bert": BertModel(BertConfig(**SHAPE)),
        "bert-cls": BertModel(BertConfig(**SHAPE)),
        "head": BertForSequenceClassification(BertConfig(**SHAPE, **three)),
        "distilbert": DistilBertModel(
            DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=48)
        ),
        "ner": BertForTokenClassification(BertConfig(**{**SHAPE, "vocab_size": 200}, **entities)),
        "ner-bytes": RobertaForTokenClassification(
            RobertaConfig(**{**SHAPE, "vocab_size": 300}, **entities, pad_token_id=0)
        ),
        "mpnet": MPNetModel(MPNetConfig(**SHAPE)),
        "roberta": RobertaForSequenceClassification(RobertaConfig(**SHAPE, **three, pad_token_id=0)),
    }
    folders = {}
    for name, model in made.items():
        _widen(model)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        SAVERS.get(name, _save_tokenizer)(folders[name])
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
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{word: i + 4 for i, word in enumerate(WORDS)}}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    _wrap(fast, folder)


def _save_pieces(folder: Path) -> None:
    """WordPiece: lower case, accents dropped, words cut into pieces with ##."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*WORDS, *letters, *(f"##{letter}" for letter in letters), "##ing", "##ed", ".", ",", "-", "磁"]
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *dict.fromkeys(pieces)])}
    fast = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    _wrap(fast, folder, model_max_length=46)


def _save_bytes(folder: Path) -> None:
    """Byte-level BPE without merges: every byte is a token, so letters beyond ASCII are several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *alphabet]
    fast = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    _wrap(fast, folder, model_max_length=46)


def _wrap(fast: Any, folder: Path, **limits: int) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        **limits,
    )
    wrapped.save_pretrained(folder)


SAVERS = {"ner": _save_pieces, "ner-bytes": _save_bytes}
