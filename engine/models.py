"""Reads what a model's folder says about it; loads it with transformers.

A model is a folder in Hugging Face layout: `config.json`, `tokenizer.json` and safetensors weights (pickled
weights are never read), optionally sentence-transformers' `modules.json` and `1_Pooling`. Where it is: `model_place`.
Python code that comes with a model is never run.

Fails: `Permanent`, naming the model or the file and the way out.
"""

import errno
import hashlib
import os
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from engine.model_files import AGAIN, optional_json, read_json, regular, unreadable, weights_digest
from engine.sentence_folder import is_lowercased, pooling_of
from sluice.errors import Permanent, Retryable, SluiceError

# Tokenizers without a limit say so with a number like 1e30.
_NO_LIMIT: Final = 1 << 20
# Of a library's message: no more of it is told; a shorter one, such as a KeyError's, says nothing by itself.
_MESSAGE_MAX, _MESSAGE_MIN = 300, 20
# What the system lacks, by its number; and how libraries tell of that, and of a device that fails.
_SHORTAGES: Final = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_MACHINE: Final = (
    *("out of memory", "enough memory", "allocate memory", "cuda error", "cuda driver", "cuda gpu", "nvidia driver"),
    *("cudnn error", "cublas_status", "hip error"),
)
# Families whose position table has extra rows in front of position 0.
_OFFSET_POSITIONS: Final = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}

# Ends of architectures' names, as config.json states them; any other architecture is an encoder.
_HEADS: Final[dict[str, "Kind"]] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
    "ForCausalLM": "generation",
    "LMHeadModel": "generation",
    "ForConditionalGeneration": "generation",
    "ForImageTextToText": "generation",
    "ForVision2Seq": "generation",
}
# Heads that are left off without harm: the encoder under them is what embeddings are made from.
_BARE: Final = ("ForMaskedLM", "ForPreTraining", "ForTextEncoding")
# What decides a model's results beside its weights.
_CONTENT: Final = (
    "config.json",
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("sentence_bert_config.json", "modules.json"),
)
_GENERATION_CONTENT: Final = ("generation_config.json", "chat_template.jinja", "processor_config.json")

Kind = Literal["embedding", "classification", "tokens", "generation"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known about a model before its weights are loaded.

    Attributes:
        name: as configured.
        folder: where it is.
        version: 12 hexadecimal digits over configuration, tokenizer and weights.
        kind: by its head: `classification` of sequences, `tokens` (classification of tokens), `generation` of text
            (causal, encoder-decoder, or from images and text); without one `embedding`.
        length_max: longest input in tokens.
        pooling: how token vectors become one: `mean` or `cls`.
        labels: of a classification head, in the order of the logits.
        config: the content of `config.json`.
    """

    name: str
    folder: Path
    version: str
    kind: Kind
    length_max: int
    pooling: Literal["mean", "cls"]
    labels: tuple[str, ...]
    config: dict[str, Any]


def read_card(model: str, folder: Path) -> ModelCard:
    """Reads the folder's own description."""
    config = read_json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise Permanent(f"model '{model}': {folder} has no safetensors weights (pickled weights are not read)")
    try:
        _require_known(model, folder, config)
        kind = _kind(folder, config)
        pooling = pooling_of(folder) if kind in {"embedding", "classification"} else "mean"
        return ModelCard(
            name=model,
            folder=folder,
            version=_version(folder, weights, kind, pooling),
            kind=kind,
            length_max=_length_max(folder, config),
            pooling=pooling,
            labels=_labels(config) if kind in {"classification", "tokens"} else (),
            config=config,
        )
    except OSError as error:
        raise unreadable(error, folder) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise Permanent(f"{folder / 'config.json'}: damaged: {error}; {AGAIN}") from error


def load_tokenizer(card: ModelCard) -> Any:
    """The model's `tokenizers.Tokenizer`."""
    from transformers import AutoTokenizer

    with quiet(), translated(card, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(card.folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise Permanent(f"model '{card.name}': it has no fast tokenizer (tokenizer.json)")
        fast = tokenizer.backend_tokenizer
        if fast.get_vocab_size() <= len(tokenizer.all_special_ids):
            why = f"cannot load the tokenizer from {card.folder}: no tokenizer.json"
            raise Permanent(f"model '{card.name}': {why}; {AGAIN}")
        if is_lowercased(card.folder):
            from tokenizers.normalizers import Lowercase, Sequence

            fast.normalizer = Sequence([Lowercase(), *([fast.normalizer] if fast.normalizer else [])])
        return fast


def load_model(card: ModelCard) -> Any:
    """The transformers model in fp32 and evaluation mode, on the CPU.

    Raises:
        Permanent: damaged, or a model that generates text.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    if card.kind == "generation":
        raise Permanent(
            f"model '{card.name}' generates text ({_architecture(card.config)}): it offers generate, and none of "
            "embed, classify, novelty and tokens"
        )
    heads = {"classification": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}
    return load_weights(card, heads.get(card.kind, AutoModel), torch.float32)


def load_weights(card: ModelCard, factory: Any, dtype: Any) -> Any:
    """The model that a transformers `Auto...` class makes of a folder, in evaluation mode, on the CPU.

    Raises:
        Permanent: naming the damaged file, or the first weight that is missing.
    """
    with quiet(), translated(card, "weights"):
        check_weights(card)
        model, report = factory.from_pretrained(
            str(card.folder),
            dtype=dtype,
            # transformers takes SDPA where the architecture has it, else its own attention (mpnet, deberta).
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise Permanent(
            f"model '{card.name}': cannot load the weights from {card.folder}: {name} has the shape {tuple(found)}, "
            f"and config.json asks for {tuple(wanted)}: they are of two models; {AGAIN}"
        )
    # transformers fills what is missing with random numbers and only logs it. The pooler of a bare encoder
    # is not used.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise Permanent(f"model '{card.name}': {card.folder} lacks {len(missing)} weights, first {missing[0]}; {AGAIN}")
    return model.eval()


def _length_max(folder: Path, config: dict[str, Any]) -> int:
    offset = _OFFSET_POSITIONS.get(str(config.get("model_type")), 0)
    stated = (
        _limit(folder / "sentence_bert_config.json", "max_seq_length"),
        _limit(folder / "tokenizer_config.json", "model_max_length"),
        int(config.get("max_position_embeddings") or _NO_LIMIT) - offset,
    )
    return min(int(limit) for limit in (*stated, 8192) if 0 < limit < _NO_LIMIT)


def _limit(file: Path, key: str) -> float:
    """A number in an optional file; 0 when it is not stated."""
    value = optional_json(file).get(key) or 0
    if not isinstance(value, int | float):
        raise Permanent(f"{file}: damaged: {key} is no number; {AGAIN}")
    return value


def _version(folder: Path, weights: list[Path], kind: Kind, pooling: str) -> str:
    digest = hashlib.blake2b(pooling.encode(), digest_size=6)
    for name in (*_CONTENT, *(_GENERATION_CONTENT if kind == "generation" else ())):
        file = folder / name
        digest.update(regular(file).read_bytes() if os.path.lexists(file) else b"-")
    digest.update(weights_digest(map(regular, weights)))
    return digest.hexdigest()


def _architecture(config: dict[str, Any]) -> str:
    """As config.json states it, or nothing."""
    return str((config.get("architectures") or [""])[0])


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    architecture = _architecture(config)
    kind: Kind = next((kind for end, kind in _HEADS.items() if architecture.endswith(end)), "embedding")
    # Embedding models that were made from another model keep its architecture's name.
    made_to_embed = (folder / "modules.json").exists()
    bare = architecture.endswith(_BARE) or not re.search("For[A-Z]", architecture)
    if kind == "embedding" and not (bare or made_to_embed):
        raise Permanent(
            f"{folder / 'config.json'}: a model of the architecture {architecture} is not made for embeddings, and its "
            "own task is none of the engine's. Choose an embedding model, or one that classifies texts or tokens"
        )
    return "embedding" if kind == "generation" and made_to_embed else kind


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    labels = {int(key): str(value) for key, value in (config.get("id2label") or {}).items()}
    if sorted(labels) != list(range(len(labels))) or not labels:
        raise ValueError("id2label does not name the labels 0, 1, 2, ...")
    return tuple(labels[i] for i in range(len(labels)))


def _require_known(model: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuses what the installed transformers cannot load without running code of the model's own."""
    import transformers

    architecture, family = _architecture(config), config.get("model_type")
    if config.get("auto_map") and not hasattr(transformers, architecture):
        raise Permanent(
            f"model '{model}': {folder / 'config.json'} asks for Python code of its own (auto_map, {architecture}), "
            "and such code is never run. Choose a model that transformers knows, or a conversion of this one to it"
        )
    if not isinstance(family, str) or family not in _families():
        raise Permanent(
            f"model '{model}': {folder / 'config.json'} names the architecture {family!r}, which transformers "
            f"{transformers.__version__} does not know. Upgrade transformers, or choose another model"
        )


def _families() -> Container[str]:
    """Every `model_type` that the installed transformers knows."""
    from transformers.models.auto import configuration_auto

    return configuration_auto.CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]


def check_weights(card: ModelCard) -> None:
    """Names the file that is damaged or missing; transformers names the folder at best. Reads headers only."""
    from safetensors import SafetensorError, safe_open

    index = card.folder / "model.safetensors.index.json"
    parts = optional_json(index).get("weight_map", {})
    if not isinstance(parts, dict):
        raise Permanent(f"{index}: damaged: weight_map is no JSON object; {AGAIN}")
    for name in sorted(set(map(str, parts.values()))):
        if not (card.folder / name).exists():
            raise Permanent(f"model '{card.name}': cannot load the weights: {card.folder / name} is missing; {AGAIN}")
    for file in sorted(card.folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            if _of_machine(error):
                raise
            with file.open("rb") as content:
                pointer = content.read(24).startswith(b"version https://git-lfs")
            why = (
                "a Git LFS pointer instead of weights: run 'git lfs pull'" if pointer else f"damaged ({error}); {AGAIN}"
            )
            raise Permanent(f"model '{card.name}': cannot load the weights: {file}: {why}") from error


@contextmanager
def translated(card: ModelCard, what: str) -> Iterator[None]:
    """Whatever a library raises for a damaged model, as Permanent; lack of memory or a failing device as Retryable."""
    try:
        yield
    except (SluiceError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # they raise what they like for damage, and a panic in Rust is no Exception
        if _of_machine(error):
            raise Retryable(
                f"model '{card.name}': cannot load the {what} now: {in_short(error)}; the files may be in order: free "
                "memory or look after the device, and start again"
            ) from error
        why = f"{in_short(error)}; {AGAIN}"
        if what == "tokenizer" and not (card.folder / "tokenizer.json").exists():
            why = f"it has no tokenizer.json; copy or download it again ({in_short(error)})"
        raise Permanent(f"model '{card.name}': cannot load the {what} from {card.folder}: {why}") from error


def _of_machine(error: BaseException) -> bool:
    """Whether memory or the device is to blame, and not the model."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _MACHINE)


def in_short(error: BaseException) -> str:
    """A library's error on one line; some take a page for it."""
    text = " ".join(str(error).split())[:_MESSAGE_MAX]
    return text if len(text) > _MESSAGE_MIN else f"{type(error).__name__}: {text}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads; as it was afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
