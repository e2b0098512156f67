"""What the tests of generation share: prompts, plain transformers' answers, and waiting for a generator."""

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path

from engine.config import EngineConfig
from engine.generation import Answer
from engine.generation_model import Generative, load_generative

PROMPTS = [
    "the disk is full",
    "a",
    "user login failed " * 6,
    "磁盘已满 🚀",
    "error: " + "x" * 150,
    "link lost",
]


@cache
def loaded(folder: Path) -> Generative:
    return load_generative(EngineConfig(model=str(folder), device="cpu"))


def plain(folder: Path, prompts: list[str], new_tokens: int, images: list[bytes] | None = None) -> list[str]:
    """What the documentation of transformers does: one prompt after another."""
    import torch

    model = loaded(folder)
    tokenizer = model.tokenizer
    texts = []
    for prompt in prompts:
        inputs = model.read(prompt, images or (), False).inputs or tokenizer(prompt, return_tensors="pt")
        start = 1 if model.net.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = model.net.generate(
                **{key: value for key, value in inputs.items() if key != "token_type_ids"},
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        texts.append(tokenizer.decode(output[0, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - figures have no event; bounded by the time-out
            await asyncio.sleep(0.001)


async def text_of(answer: Answer) -> str:
    return "".join([piece async for piece in answer])


async def first_piece(answer: Answer) -> str:
    return await asyncio.wait_for(anext(answer), 20)
