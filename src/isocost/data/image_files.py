"""The only reader of image files: which formats are opened, which suffixes are images, and how pixels become 8-bit RGB.

The content of a file determines its decoder, not its name. Pillow has decoders that start other programs (Ghostscript for
PostScript). Therefore only the formats of `FORMATS` are opened. Training, scoring, DreamBooth, super-resolution and reports
read every image with `read_rgb`.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, UnidentifiedImageError

from isocost.errors import ConfigError
from isocost.utils.warn_once import warn_once

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. Their decoders start no program."""
IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
        *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
FIRST_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
"""The suffixes of `READING_VERSION` 1, see `datasets.source_fingerprint`."""
SYSTEM_NAMES = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "__macosx", "desktop.ini", "lost+found", "system volume information", "thumbs.db"}
)
"""Files and folders that operating systems and network disks create, in lower case. Hidden names are ignored as well."""
_DOCUMENT_SUFFIXES = frozenset(
    {
        *("", ".csv", ".html", ".ipynb", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".parquet", ".py", ".rst"),
        *(".tar", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip"),
    }
)
_SIGNATURES = {
    b"%!PS": "a PostScript file",
    b"\xc5\xd0\xd3\xc6": "a PostScript file",
    b"%PDF": "a PDF file",
    b"<svg": "an SVG file",
    b"<?xml": "an XML or SVG file",
    b"<!DOC": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer; run `git annex get`",
}
_DECODER_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError),
    *(RuntimeError, ZeroDivisionError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""Errors of Pillow's decoders on damaged files."""


class UnreadableImage(ValueError):
    """An image cannot be read. The message is one line and does not contain the name of the file."""


# --- one image ------------------------------------------------------------------------------------------------------


def read_rgb(source: Path | bytes, check: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB: turned by its EXIF orientation, transparent areas on white, 16-bit grey scaled to 8 bits.

    The first frame of an animation is read.

    Args:
        source: a file, or its content.
        check: called with the decoded image before the conversion; may raise ConfigError.

    Raises:
        UnreadableImage: the content has another format, is damaged, or has pixels without a known range.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
            opened.load()
            if check is not None:
                check(opened)
            return _to_rgb(opened)
    except (ConfigError, UnreadableImage):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(_describe_unknown(source)) from error
    except _DECODER_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(" ".join(reason.split())[:120] or type(error).__name__) from error


def read_image_file(file: Path, check: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """Read a file that the user named, in the same way as `read_rgb`.

    Raises:
        ConfigError: there is no such file, it cannot be read, or `check` refuses it.
    """
    if not os.path.isfile(file):
        missing = "a link whose target is missing" if os.path.islink(file) else "no such image"
        raise ConfigError(f"{printable(str(file))}: {missing}; give the path of an image file")
    try:
        return read_rgb(file, check)
    except UnreadableImage as error:
        raise ConfigError(f"{printable(str(file))}: the image cannot be read ({error}); remove or replace it") from error


def center_square(rgb: Image.Image, resolution: int | None = None) -> np.ndarray:
    """Crop an RGB image to its centre square and resize it (Lanczos) to uint8 [R, R, 3]; None keeps the size of the square."""
    size = min(rgb.size)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    rgb = rgb.crop((left, top, left + size, top + size))
    if resolution is not None and size != resolution:
        rgb = rgb.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


_EXIF_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(opened: Image.Image) -> Image.Image:
    image = _to_8_bits(_apply_exif_orientation(opened), opened.format)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _apply_exif_orientation(opened: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; a broken EXIF block is ignored."""
    try:
        transpose = _EXIF_ORIENTATIONS.get(opened.getexif().get(0x0112, 1))
    except (ValueError, TypeError, SyntaxError, OSError, KeyError, struct.error):
        transpose = None
    return opened if transpose is None else opened.transpose(transpose)


def _to_8_bits(image: Image.Image, image_format: str | None) -> Image.Image:
    """Scale 16-bit grey to 8 bits; a level that the file declares transparent becomes white."""
    if image.mode == "F" or (image.mode == "I" and image_format not in ("PNG", "PPM")):
        kind = "floating point" if image.mode == "F" else "32-bit integers"
        raise UnreadableImage(f"its pixels are {kind} of unknown range; save it with 8 or 16 bits per channel")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    grey = (levels / 257).round().astype(np.uint8)
    if "transparency" in image.info:
        grey[levels == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _describe_unknown(source: Path | bytes) -> str:
    """The reason why a file is not opened, from its first bytes."""
    if isinstance(source, bytes):
        head = source[:32]
    else:
        with source.open("rb") as stream:
            head = stream.read(32)
    if not head:
        return "the file is empty"
    kind = next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)
    return f"it is {kind}" if kind else f"unknown format; formats are {', '.join(FORMATS)}"


# --- folders of images ----------------------------------------------------------------------------------------------


def printable(name: str) -> str:
    """A file name as valid UTF-8; bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def is_image_name(name: str | PurePath) -> bool:
    """Whether a file name has the suffix of an image."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def system_part(relative: PurePath) -> str | None:
    """The part of a relative path that makes a file ignored, such as `.ipynb_checkpoints`; None if the file is read.

    These are hidden names, names of `SYSTEM_NAMES`, and `._*`, the copies that macOS makes.
    """
    for part in relative.parts:
        if part.startswith("._"):
            return "._*"
        if (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM_NAMES:
            return part
    return None


@dataclass
class FolderContent:
    """The files of a folder and its subfolders, in the order of their paths.

    Attributes:
        files: regular files and links to files.
        dangling: links whose target is missing.
        ignored: number of ignored image files by the system name in their path.
    """

    files: list[Path]
    dangling: list[Path] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> list[Path]:
        """Image files, including links whose target is missing."""
        return sorted(file for file in (*self.files, *self.dangling) if is_image_name(file))

    def note(self) -> str:
        """Name and count the files that are not read as images, without captions and documents; empty if there are none."""
        others = Counter(
            printable(file.suffix.lower())
            for file in self.files
            if not is_image_name(file) and file.suffix.lower() not in _DOCUMENT_SUFFIXES
        )
        parts = [f"{count} {suffix}" for suffix, count in sorted(others.items())]
        parts += [f"{count} in {printable(name)}" for name, count in sorted(self.ignored.items())]
        total = others.total() + self.ignored.total()
        return f"{total} files are ignored: {', '.join(parts)}" if parts else ""


def list_folder(folder: Path) -> FolderContent:
    """List the files of a folder and its subfolders. Links to folders are followed; hidden and system names are ignored.

    Raises:
        ConfigError: a folder cannot be read.
    """
    content = FolderContent([])
    for file in _walk(folder, ()):
        if (part := system_part(file.relative_to(folder))) is not None:
            content.ignored.update([part] if is_image_name(file) else [])
        elif file.is_file():
            content.files.append(file)
        elif file.is_symlink():
            content.dangling.append(file)
        elif is_image_name(file):  # a pipe, a socket or a device
            content.ignored.update(["special files"])
    content.files.sort()
    content.dangling.sort()
    return content


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted by path; a warning counts the files that are ignored.

    Raises:
        ConfigError: there is no such folder, or it cannot be read.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{printable(str(folder))}: no such folder of images")
    content = list_folder(folder)
    if note := content.note():
        warn_once(f"{printable(str(folder))}: {note}")
    return content.images


def _walk(folder: Path, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        status = folder.stat()
        if (identity := (status.st_dev, status.st_ino)) in ancestors:
            return
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise ConfigError(
            f"{printable(str(folder))}: the folder cannot be read ({error.strerror}); check its permissions"
        ) from error
    for name, is_folder in listed:
        if is_folder:
            yield from _walk(folder / name, (*ancestors, identity))
        else:
            yield folder / name
