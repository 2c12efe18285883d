"""The images of the page: each embedded once, however often it is shown, and small enough for the page to be sent by mail.

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
"""Of all images together, as base64."""
SHOWN_SIDE = 72
"""About how many pixels wide an image is shown in a sheet."""


@dataclass(frozen=True)
class Encoding:
    """How images are made small: the longest side in pixels, and WebP's quality; None is lossless."""

    longest_side: int
    quality: int | None

    @property
    def words(self) -> str:
        """What a reader must know of it."""
        kept = "without loss" if self.quality is None else f"as WebP of quality {self.quality}: look for large differences only"
        return f"at most {self.longest_side} pixels wide, {kept}"


ENCODINGS = (Encoding(128, None), Encoding(128, 90), Encoding(96, 85), Encoding(64, 80), Encoding(48, 75))
"""From faithful to small."""


@dataclass(frozen=True)
class EmbeddedImages:
    """Images by key as data addresses, how they were made small, and the width in pixels at which a sheet shows them."""

    addresses: Mapping[str, tuple[str, ...]]
    encoding: Encoding
    shown_side: int


def album(images: Mapping[str, np.ndarray], most_bytes: int = MAX_BYTES) -> EmbeddedImages:
    """Encode images uint8 [K, H, W, 3] by key, by the first of `ENCODINGS` under which they fit; the last fits or not."""
    for encoding in ENCODINGS:
        addresses: dict[str, tuple[str, ...]] = {}
        room = most_bytes
        for key, some in images.items():
            addresses[key] = tuple(_address(image, encoding) for image in some)
            room -= sum(len(address) for address in addresses[key])
            if room < 0 and encoding != ENCODINGS[-1]:
                break
        else:
            break
    widths = [some.shape[2] for some in images.values()]
    width = min(max(widths, default=SHOWN_SIDE), encoding.longest_side)
    return EmbeddedImages(addresses, encoding, width * max(1, round(SHOWN_SIDE / width)) if width < SHOWN_SIDE else SHOWN_SIDE)


def _address(image: np.ndarray, encoding: Encoding) -> str:
    """An image uint8 [H, W, 3] as a data address."""
    encoded = Image.fromarray(image)
    if max(encoded.size) > encoding.longest_side:
        encoded.thumbnail((encoding.longest_side, encoding.longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if encoding.quality is None:
        encoded.save(buffer, "WEBP", lossless=True, method=4)
    else:
        encoded.save(buffer, "WEBP", quality=encoding.quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
