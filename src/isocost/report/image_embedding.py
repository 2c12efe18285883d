"""Embeds each image of the page once, however often it is shown, at a size that keeps the page small enough to mail.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_BYTES = 6_000_000
"""Limit for all images together, as base64."""
DISPLAY_SIZE = 72
"""Approximate width in pixels of an image on the page."""


@dataclass(frozen=True)
class Encoding:
    """How images are compressed.

    Attributes:
        max_side: longest side in pixels; larger images are scaled down.
        quality: WebP quality; None is lossless.
    """

    max_side: int
    quality: int | None

    @property
    def description(self) -> str:
        """The encoding as text for the reader of the page."""
        quality = "lossless" if self.quality is None else f"as WebP of quality {self.quality}; only judge large differences"
        return f"at most {self.max_side} pixels wide, {quality}"


ENCODINGS = (Encoding(128, None), Encoding(128, 90), Encoding(96, 85), Encoding(64, 80), Encoding(48, 75))
"""In order of decreasing quality."""


@dataclass(frozen=True)
class EmbeddedImages:
    """Encoded images.

    Attributes:
        data_urls: key -> one data URL per image.
        display_size: width in pixels at which image grids show them.
    """

    data_urls: Mapping[str, tuple[str, ...]]
    encoding: Encoding
    display_size: int


def embed_images(images: Mapping[str, np.ndarray], max_bytes: int = MAX_BYTES) -> EmbeddedImages:
    """Encode images with the first of `ENCODINGS` that fits into `max_bytes`, or with the last one if none fits.

    Args:
        images: key -> images uint8 [K, H, W, 3].
    """
    for encoding in ENCODINGS:
        data_urls: dict[str, tuple[str, ...]] = {}
        bytes_left = max_bytes
        for key, batch in images.items():
            data_urls[key] = tuple(_data_url(image, encoding) for image in batch)
            bytes_left -= sum(len(url) for url in data_urls[key])
            if bytes_left < 0 and encoding != ENCODINGS[-1]:
                break
        else:
            break
    widths = [batch.shape[2] for batch in images.values()]
    width = min(max(widths, default=DISPLAY_SIZE), encoding.max_side)
    display_size = width * max(1, round(DISPLAY_SIZE / width)) if width < DISPLAY_SIZE else DISPLAY_SIZE
    return EmbeddedImages(data_urls, encoding, display_size)


def _data_url(image: np.ndarray, encoding: Encoding) -> str:
    encoded = Image.fromarray(image)
    if max(encoded.size) > encoding.max_side:
        encoded.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if encoding.quality is None:
        encoded.save(buffer, "WEBP", lossless=True, method=4)
    else:
        encoded.save(buffer, "WEBP", quality=encoding.quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
