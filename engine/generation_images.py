"""Images as they come in: bytes, checked before they are decoded.

A small file can hold an image of gigabytes (a decompression bomb): the size that its head states is checked before a
single pixel is read, and only formats that are expected are tried.

Fails: Permanent, naming which of the images is wrong and why; the others and other requests are not concerned.
"""

import io
from collections.abc import Sequence
from typing import Any, Final

from engine.config import GenerationConfig
from sluice.errors import MissingExtra, Permanent

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def decode(images: Sequence[bytes], config: GenerationConfig) -> list[Any]:
    """The images as RGB `PIL.Image`s; of a moving one the first frame.

    Raises:
        Permanent: too many, too large, or no image.
        MissingExtra: Pillow is not installed.
    """
    if len(images) > config.images_max:
        raise Permanent(f"{len(images)} images exceed {config.images_max} (engine.generation.images_max)")
    return [_decode(f"image {number}", data, config) for number, data in enumerate(images, 1)]


def _decode(name: str, data: bytes, config: GenerationConfig) -> Any:
    if not isinstance(data, bytes | bytearray | memoryview):
        raise Permanent(f"{name}: not bytes but {type(data).__name__}")
    if len(data) > config.image_bytes_max:
        raise Permanent(
            f"{name} of {len(data)} bytes exceeds {config.image_bytes_max} (engine.generation.image_bytes_max)"
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("vision", "PIL") from error
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Permanent(f"{name}: {error}") from error
    except Exception as error:  # Pillow's readers raise what they like for damage
        raise Permanent(f"{name}: no image of a known format ({', '.join(FORMATS)})") from error
    with image:
        width, height = image.size
        if width * height > config.image_pixels_max:
            raise Permanent(
                f"{name} of {width} x {height} pixels exceeds {config.image_pixels_max} "
                "(engine.generation.image_pixels_max)"
            )
        try:
            return image.convert("RGB")
        except Exception as error:
            raise Permanent(f"{name}: damaged {image.format}: {error}") from error
