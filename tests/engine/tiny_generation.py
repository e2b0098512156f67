"""Small generative models with random weights: real folders in Hugging Face layout."""

import io
from pathlib import Path
from typing import Any

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[answer] "


def build_all(root: Path) -> dict[str, Path]:
    """Folders by name: `llama`, `penalty` (asks for a repetition penalty), `t5`, `llava`."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(7)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seeing = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**TEXT),
        image_token_index=3,
        vision_feature_layer=-1,
        eos_token_id=2,
        pad_token_id=0,
    )
    t5 = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=2, decoder_start_token_id=0
    )
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(LlamaConfig(**TEXT)),
        "penalty": LlamaForCausalLM(LlamaConfig(**TEXT)),
        "t5": T5ForConditionalGeneration(t5),
        "llava": LlavaForConditionalGeneration(seeing),
    }
    made["penalty"].generation_config.repetition_penalty = 1.5
    folders = {}
    for name, model in made.items():
        _widen(model)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        _save_tokenizer(folders[name], see=name == "llava")
    return folders


def _widen(model: Any) -> None:
    """Fresh weights are so small that every text would go on alike."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)


def _save_tokenizer(folder: Path, *, see: bool) -> None:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    if not see:
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
        return
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def byte_level() -> Any:
    """Every byte is a token, and some characters' first two bytes are another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pair = tuple(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("磁")[0][0][:2])
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "".join(pair)])}
    fast = Tokenizer(models.BPE(vocabulary, [pair]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def picture(
    width: int = 40, height: int = 30, colour: tuple[int, int, int] = (200, 10, 10), form: str = "PNG"
) -> bytes:
    """An image file."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, form)
    return file.getvalue()
