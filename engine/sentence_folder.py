"""What sentence-transformers' files in a model's folder say: what texts go through, and how token vectors become one.

The engine pools by mean or by [CLS] and normalises. A model that is made for anything else would give vectors that look
right and are not, so it is refused.

Fails: `Permanent`, with the file, what it asks for, and the way out.
"""

from pathlib import Path
from typing import Any, Final, Literal

from engine.model_files import optional_json, optional_objects
from sluice.errors import Permanent

_MODULES: Final = frozenset({"Transformer", "Pooling", "Normalize"})
# The older way to say it, one switch for each mode.
_SWITCHES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_of(folder: Path) -> Literal["mean", "cls"]:
    """How an embedding model pools; mean when its folder does not say.

    Raises:
        Permanent: it pools in another way, or has a module, or a prompt for every text, that the engine has not.
    """
    place = folder / "1_Pooling"
    for module in optional_objects(folder / "modules.json"):
        library, _, name = str(module.get("type")).rpartition(".")
        if name not in _MODULES or not library.startswith("sentence_transformers"):
            raise Permanent(
                f"{folder / 'modules.json'}: the model has a module {module.get('type')!r}, and the engine computes "
                f"{', '.join(sorted(_MODULES))} only: its embeddings would be wrong. Choose a model without it"
            )
        if name == "Pooling":
            place = folder / str(module.get("path"))
    _refuse_prompt(folder)
    match _modes(optional_json(place / "config.json")):
        case [] | ["mean"]:
            return "mean"
        case ["cls"]:
            return "cls"
        case modes:
            raise Permanent(
                f"{place / 'config.json'}: the model pools by {' and '.join(modes)}, and the engine by mean or cls "
                "only: its embeddings would be wrong. Choose a model that pools by one of these"
            )


def is_lowercased(folder: Path) -> bool:
    """Whether texts are put into lower case before they become tokens, whatever the tokenizer does by itself.

    Raises:
        Permanent: the file is damaged.
    """
    return bool(optional_json(folder / "sentence_bert_config.json").get("do_lower_case"))


def prompts_of(folder: Path) -> dict[str, Any]:
    """The texts that a model wants in front of others, by name: `query`, `passage`. The engine adds none."""
    prompts = optional_json(folder / "config_sentence_transformers.json").get("prompts")
    return {name: text for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}


def _modes(config: dict[str, Any]) -> list[str]:
    stated = config.get("pooling_mode")
    if stated is None:
        return [mode for switch, mode in _SWITCHES.items() if config.get(switch)]
    return [str(mode) for mode in (stated if isinstance(stated, list) else [stated])]


def _refuse_prompt(folder: Path) -> None:
    file = folder / "config_sentence_transformers.json"
    name = optional_json(file).get("default_prompt_name")
    if name is not None and (prompt := prompts_of(folder).get(str(name))):
        raise Permanent(
            f"{file}: the model wants {prompt!r} in front of every text (default_prompt_name {name!r}), and the engine "
            "adds nothing to texts. Set default_prompt_name to null there, and put it in front of the texts yourself"
        )
