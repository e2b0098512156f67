"""Images and text through the same door; images that are none, or too much."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.generation import Generator
from sluice.errors import Permanent
from tests.engine.generating import plain, text_of
from tests.engine.tiny_generation import picture


async def test_images_and_text_equal_plain_generate(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    images = [picture(), picture(16, 90, (3, 200, 3), "JPEG")]
    generator: Generator = await open_generator(generative["llava"])
    assert generator.sees
    assert generator.plan()["batching"] == "one by one: continuous batching takes no images"
    cases = [images, images[:1], images[1:], []]
    answers = [generator.generate("what is this?", images=each, max_new_tokens=20) for each in cases]
    texts = await asyncio.gather(*map(text_of, answers))
    assert texts == [plain(generative["llava"], ["what is this?"], 20, each)[0] for each in cases]
    assert len(set(texts)) == len(texts), "the model must look at the images"
    assert answers[0].usage.prompt_tokens == answers[3].usage.prompt_tokens + 2 * 4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([b""], "image 1: no image of a known format"),
        ([picture(), b"GIF89a junk"], "image 2: no image of a known format"),
        ([picture()[:60]], "image 1: damaged PNG"),
        ([picture(300, 300)], r"image 1 of 300 x 300 pixels exceeds 10000 \(engine.generation.image_pixels_max\)"),
        ([picture(60, 60, form="BMP")], r"image 1 of 10854 bytes exceeds 5000 \(engine.generation.image_bytes_max\)"),
        ([picture()] * 4, r"4 images exceed 3 \(engine.generation.images_max\)"),
        (["text"], "image 1: not bytes but str"),
    ],
)
async def test_a_bad_image_is_refused_alone(
    open_generator: Callable[..., Any], generative: dict[str, Path], images: list[Any], message: str
) -> None:
    generator: Generator = await open_generator(
        generative["llava"], images_max=3, image_bytes_max=5000, image_pixels_max=10_000
    )
    good = asyncio.ensure_future(text_of(generator.generate("x", images=[picture()], max_new_tokens=4)))
    with pytest.raises(Permanent, match=message):
        await text_of(generator.generate("x", images=images))
    assert await good is not None


async def test_a_prompt_that_names_images_it_does_not_have_is_refused(
    open_generator: Callable[..., Any], generative: dict[str, Path]
) -> None:
    generator: Generator = await open_generator(generative["llava"])
    with pytest.raises(Permanent, match="cannot take this prompt with its images"):
        await text_of(generator.generate("<image><image> what?", images=[picture()], max_new_tokens=4))
