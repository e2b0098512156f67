"""Opens a model that generates text, alone or from images, and turns prompts into its input.

Three families, told apart by what transformers knows of the folder's `model_type`: language models, models from
images and text, and encoder-decoder models. Weights are safetensors, and code that comes with a model is never run.

Fails: Permanent, naming the model or what is wrong with a prompt; ConfigError for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from engine import generation_images, models
from engine.config import DEFAULT_NAME, GENERATION_NAME, EngineConfig
from engine.loading import calm_openmp
from engine.model_place import NotFound, locate
from engine.models import ModelCard
from sluice.errors import ConfigError, Permanent

if TYPE_CHECKING:
    import torch

# Models without a stated limit.
_CONTEXT_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model takes it.

    Attributes:
        ids: token ids.
        inputs: everything the model takes, as tensors, when that is more than the ids.
    """

    ids: list[int]
    inputs: dict[str, Any] | None = None


@dataclass(slots=True)
class Generative:
    """A loaded model.

    Attributes:
        card: what its folder says.
        net: the transformers model, on its device, in evaluation mode.
        tokenizer: a fast transformers tokenizer.
        processor: for images and text; None for a model of text alone.
        config: the engine's section.
        reasons: what was chosen, and why.
    """

    card: ModelCard
    net: Any
    tokenizer: Any
    processor: Any
    config: EngineConfig
    reasons: dict[str, str]

    @property
    def context_tokens(self) -> int:
        """What the model can see, prompt and new tokens together."""
        text = self.net.config.get_text_config(decoder=True)
        stated = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        return min(int(stated or _CONTEXT_MAX), _CONTEXT_MAX)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text."""
        ends = self.net.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return [] if ends is None else [int(end) for end in ([ends] if isinstance(ends, int) else ends)]

    def decode(self, ids: Sequence[int]) -> str:
        """All of some tokens at once, special tokens left out."""
        return str(self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True))

    def read(self, prompt: str, images: Sequence[bytes], chat: bool) -> Prompt:
        """A prompt in tokens; images need a model that can see.

        Raises:
            Permanent: a bad image, images for a model of text, no chat template, or too long a prompt.
        """
        seeing = bool(images) or (chat and self.processor is not None)
        read = self._read_seeing(prompt, images) if seeing else Prompt(self._ids(prompt, chat=chat))
        limit = min(self.config.generation.prompt_tokens_max, self.context_tokens - 1)
        if len(read.ids) > limit:
            raise Permanent(
                f"prompt of {len(read.ids)} tokens exceeds {limit} "
                f"(engine.generation.prompt_tokens_max, or what model '{self.card.name}' can see)"
            )
        if not read.ids:
            raise Permanent("empty prompt: nothing to continue")
        return read

    def _ids(self, prompt: str, *, chat: bool) -> list[int]:
        if not chat:
            return list(self.tokenizer(prompt)["input_ids"])
        if not self.tokenizer.chat_template:
            raise Permanent(f"model '{self.card.name}' has no chat template: send the whole prompt, without chat")
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _read_seeing(self, prompt: str, images: Sequence[bytes]) -> Prompt:
        if self.processor is None:
            raise Permanent(f"model '{self.card.name}' takes text alone; images need an image-text model")
        pictures = generation_images.decode(images, self.config.generation)
        mark = getattr(self.processor, "image_token", None)
        try:
            if getattr(self.processor, "chat_template", None):
                content = [*({"type": "image", "image": each} for each in pictures), {"type": "text", "text": prompt}]
                inputs = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            elif mark and pictures:
                inputs = self.processor(text=[mark * len(pictures) + prompt], images=pictures, return_tensors="pt")
            else:
                raise Permanent(f"model '{self.card.name}' has no chat template{'' if mark else ' and no image token'}")
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
            # An image of one pixel, a prompt that contains the image token: what processors raise is about the input.
            raise Permanent(f"model '{self.card.name}' cannot take this prompt with its images: {error}") from error
        return Prompt(inputs["input_ids"][0].tolist(), dict(inputs))


def load_generative(config: EngineConfig) -> Generative:
    """Loads `engine.generation.model`, or `engine.model` when that is empty.

    Raises:
        Permanent: it is not there, damaged, or no model that generates text.
        ConfigError: the device is not there.
    """
    calm_openmp()
    name = config.generation.model or config.model
    try:
        folder = locate(name, allow_download=config.allow_download)
    except NotFound as error:
        raise error.of(GENERATION_NAME if config.generation.model else DEFAULT_NAME) from error
    card = models.read_card(name, folder)
    if card.kind != "generation":
        offered = {"tokens": "tokens", "classification": "classify, embed, novelty"}
        raise Permanent(
            f"model '{card.name}' generates no text: it offers {offered.get(card.kind, 'embed, classify, novelty')}, "
            "and not generate"
        )
    reasons = {"model": f"{card.name}, version {card.version}, from {card.folder}"}
    factory, sees = _factory(card)
    device, dtype = _place(config, card, reasons)
    net = models.load_weights(card, factory, dtype)
    with models.translated(card, f"weights onto {device}"):
        net = net.to(device)
    return Generative(card, net, _tokenizer(card), _processor(card) if sees else None, config, reasons)


def _factory(card: ModelCard) -> tuple[Any, bool]:
    """The class that loads the model, and whether it takes images."""
    import transformers
    from transformers.models.auto import modeling_auto

    family = card.config.get("model_type")
    for names, factory, sees in (
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, transformers.AutoModelForImageTextToText, True),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM, False),
        (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM, False),
    ):
        if family in names:
            return factory, sees
    raise Permanent(f"model '{card.name}': '{family}' makes no text from text or images")


def _tokenizer(card: ModelCard) -> Any:
    from transformers import AutoTokenizer

    with models.quiet(), models.translated(card, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(card.folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise Permanent(f"model '{card.name}': it has no fast tokenizer (tokenizer.json)")
        return tokenizer


def _processor(card: ModelCard) -> Any:
    from transformers import AutoProcessor

    with models.quiet(), models.translated(card, "processor of images"):
        return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            str(card.folder), local_files_only=True, trust_remote_code=False
        )


def _place(config: EngineConfig, card: ModelCard, reasons: dict[str, str]) -> tuple["torch.device", "torch.dtype"]:
    """Device and precision."""
    import torch

    there = torch.cuda.is_available()
    wanted = ("cuda:0" if there else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"engine.device: '{wanted}' is not auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not there or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"engine.device: '{wanted}' is not there ({torch.cuda.device_count()} CUDA devices)")
    dtypes: dict[str, Callable[[], torch.dtype]] = {
        "fp32": lambda: torch.float32,
        "bf16": lambda: torch.bfloat16,
        "fp16": lambda: torch.float16,
        "auto": lambda: _own_dtype(card, device),
    }
    dtype = dtypes[config.precision]()
    reasons["device"] = f"{device}: {'what is there' if config.device == 'auto' else 'configured'}"
    why = "the weights' own, where the device computes in it" if config.precision == "auto" else "configured"
    if device.type == "cpu" and config.threads:
        torch.set_num_threads(config.threads)
        reasons["threads"] = f"{config.threads}: configured"
    reasons["precision"] = f"{str(dtype).removeprefix('torch.')}: {why}"
    return device, dtype


def _own_dtype(card: ModelCard, device: "torch.device") -> "torch.dtype":
    """The precision of the weights as stored; fp32 on a CPU without instructions for less."""
    import torch

    stated = card.config.get("dtype") or card.config.get("torch_dtype")
    own = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(stated), torch.float32)
    if device.type != "cpu" or own == torch.float32:
        return own
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16") else torch.float32
