"""What can be said of the configured models without loading them, for `--check`.

Folders, descriptions, tokenizers and headers of weights are read; nothing is computed, downloaded or put onto a device.

Fails: Permanent or ConfigError, naming the key or the file, as the start would.
"""

from pathlib import Path
from typing import Final

from engine.config import GENERATION_NAME, EngineConfig, key_of
from engine.model_place import NotFound, locate
from engine.models import Kind, ModelCard, check_weights, load_tokenizer, read_card, translated
from sluice.errors import ConfigError

_OFFERED: Final[dict[Kind, tuple[str, ...]]] = {
    "embedding": ("classify", "embed", "novelty"),
    "classification": ("classify", "embed", "novelty"),
    "tokens": ("tokens",),
    "generation": ("generate",),
}


def check_models(config: EngineConfig, task: str = "", model: str = "", key: str = "") -> list[str]:
    """A line for each model: where it is, and which tasks it offers.

    Args:
        config: the engine's section.
        task: that one of them must offer; empty: none need to.
        model: the name of the one that must; empty: any of them.
        key: where the configuration asks for the task.

    Raises:
        ConfigError: a model does not offer what it is configured for.
        Permanent: one is not there, damaged, or of no use.
    """
    wanted = {name: config.of(name).model for name in config.names}
    if config.generation.model:
        wanted[GENERATION_NAME] = config.generation.model
    lines, offered = [], {}
    for name, what in wanted.items():
        card = _card(name, what, downloads=config.allow_download)
        if card is None:
            lines.append(f"model {name}: {what} comes from the hub, and is fetched at the start if need be")
            continue
        offered[name] = _OFFERED[card.kind]
        if (card.kind == "generation") != (name == GENERATION_NAME):
            other = "engine.models or engine.model" if name == GENERATION_NAME else key_of(GENERATION_NAME)
            raise ConfigError(f"{key_of(name)}: '{what}' offers {', '.join(offered[name])}: it belongs under {other}")
        lines.append(f"model {name}: {card.folder}, offers {', '.join(offered[name])}")
    # One that is still to come may offer anything.
    serving = [model] if model else list(config.names)
    if task and all(name in offered and task not in offered[name] for name in serving):
        told = "; ".join(f"'{name}' offers {', '.join(offered[name])}" for name in serving)
        raise ConfigError(f"{key}: '{task}' is not offered: {told}")
    return lines


def _card(name: str, model: str, *, downloads: bool) -> ModelCard | None:
    """What a model's folder says; None when its files may still be downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        folder = locate(model, allow_download=False)
    except NotFound as error:
        if downloads and error.downloadable:
            return None
        raise error.of(name) from error
    if downloads and Path(HF_HUB_CACHE) in folder.parents:
        return None  # the start fetches what is missing there
    card = read_card(model, folder)
    if card.kind != "generation":
        load_tokenizer(card)
    with translated(card, "weights"):
        check_weights(card)
    return card
