"""The folder of `isocost sample`: one PNG file for each image and nothing else, so that `isocost score` can read it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from isocost.errors import ConfigError
from isocost.utils.output_paths import check_output_folder, private_folder

SAMPLE_NAME = re.compile(r"[0-9]{2,}-[0-9]{2,}\.png|sheet\.png")
"""Files of `isocost sample`: PROMPT-IMAGE.png, and the sheet that versions before 0.2 saved in the folder."""


def check_sample_folder(out: Path, overwrite: bool = False) -> None:
    """Check, before anything is sampled, that a folder can take new images.

    Args:
        out: the folder.
        overwrite: whether images of an earlier call may be replaced.

    Raises:
        ConfigError: the path cannot be a folder, it holds images of an earlier call, or it holds other files.
    """
    check_output_folder(out)
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [name for name in names if SAMPLE_NAME.fullmatch(name) is None]
    if others:
        raise ConfigError(f"{out}: holds other files, such as {others[0]}; give a new folder (--out)")
    if names and not overwrite:
        raise ConfigError(f"{out}: holds {len(names)} images of an earlier call; give a new folder (--out), or --overwrite")


def sheet_file(out: Path) -> Path:
    """The file of the grid of all images, next to the folder `out`."""
    folder = out.resolve()
    return out.parent / f"{out.name}-sheet.png" if out.name else folder.with_name(f"{folder.name}-sheet.png")


def write_sample_folder(out: Path, images: np.ndarray) -> tuple[list[Path], Path]:
    """Write images as OUT/PROMPT-IMAGE.png in place of those of an earlier call, and all of them as one grid next to OUT.

    Nothing changes in the folder before all new files are written.

    Args:
        out: a folder that `check_sample_folder` accepts.
        images: uint8 [P, K, R, R, 3].

    Returns:
        The files of the images, and the file of the grid, which has a row for each prompt.
    """
    num_prompts, num_images, size, _, _ = images.shape
    names = [f"{prompt:02d}-{number:02d}.png" for prompt in range(num_prompts) for number in range(num_images)]
    sheet = sheet_file(out)
    with private_folder(out) as folder:
        for name, image in zip(names, images.reshape(-1, size, size, 3), strict=True):
            Image.fromarray(image).save(folder / name)
        grid = images.transpose(0, 2, 1, 3, 4).reshape(num_prompts * size, num_images * size, 3)
        Image.fromarray(grid).save(folder / sheet.name)
        out.mkdir(parents=True, exist_ok=True)
        for old in [path for path in out.iterdir() if SAMPLE_NAME.fullmatch(path.name)]:
            old.unlink()
        for name in names:
            shutil.move(folder / name, out / name)  # OUT may be a link to another disk
        shutil.move(folder / sheet.name, sheet)
    return [out / name for name in names], sheet
