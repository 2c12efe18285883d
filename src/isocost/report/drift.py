"""The result of `isocost drift` as Markdown for a pull request, and the pairs of images that differ most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from isocost.analysis.formatting import format_metric, format_score
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.drift import Drift, ImageDifferences, ImagePairs, ScoreDifference

TITLES = {"lpips": "LPIPS", "psnr": "PSNR, dB", "ssim": "SSIM"}
GAP, MIN_SIZE = 4, 128
"""Pixels between images, and the size to which smaller images are enlarged."""
DIFFERENCE_FACTOR = 4
"""The third column of a sheet shows the difference of both images, enlarged by this factor."""


def format_verdict(drift: Drift) -> str:
    """The answer in one line: "different, not worse"."""
    if drift.images.verdict == "identical":
        return "identical"
    return f"{drift.images.verdict}, {'not judged without --reference' if drift.verdict is None else drift.verdict}"


def drift_markdown(drift: Drift, base: str, variant: str, command: str) -> str:
    """Return the comparison as Markdown.

    Args:
        drift: the comparison.
        base, variant: what was compared, for the reader.
        command: the command that compares it again.
    """
    images = drift.images
    lines = [
        f"### Drift: {format_verdict(drift)}",
        "",
        f"`{variant}` against `{base}`: {images.num_images:,} pairs of images from the same prompts and noise.",
        "",
        *_image_lines(images),
    ]
    if drift.scores:
        lines += ["", *_score_lines(drift)]
    return "\n".join([*lines, "", f"```\n{command}\n```", ""])


def _image_lines(images: ImageDifferences) -> list[str]:
    rows = [
        ("pairs that are equal", f"{images.num_equal:,} of {images.num_images:,}"),
        ("largest difference of a pixel", f"{images.max_grey_levels} of 255 grey levels"),
        ("mean difference of a pixel", f"{images.mean_grey_levels:.3g} grey levels"),
        *((_title(name, images), _format(interval)) for name, interval in images.similarity.items()),
    ]
    return ["| images | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _title(name: str, images: ImageDifferences) -> str:
    return f"{TITLES[name]}{', of the pairs that differ' if name == 'psnr' and images.num_equal else ''}"


def _score_lines(drift: Drift) -> list[str]:
    rows = [_score_row(score) for score in drift.scores]
    confidence = drift.scores[0].difference.confidence
    note = (
        f"Protocol {drift.protocol}, {drift.num_reference:,} reference images. Differences are paired, with "
        f"{100 * confidence:.3g} % intervals. *Worse*: all of the interval is beyond the tolerance. *Not worse*: all of it is "
        "within the tolerance."
    )
    undecided = [score for score in drift.scores if score.verdict == "undecided"]
    needed = [score.num_images for score in undecided if score.num_images is not None]
    if undecided and len(needed) == len(undecided):
        note += f" About {max(needed):,} pairs would decide it in four of five cases, with enough reference images."
    elif undecided:
        note += " More pairs would not decide it."
    if drift.not_judged:
        note += f" Not judged, because they have no paired differences: {', '.join(map(format_metric, drift.not_judged))}."
    head = ["| score | base | variant | variant minus base | tolerance | verdict |", "|---|---|---|---|--:|---|"]
    return [*head, *rows, "", note]


def _score_row(score: ScoreDifference) -> str:
    cells = (_format(score.base), _format(score.variant), _format(score.difference), f"{score.tolerance:.3g}", score.verdict)
    return f"| {format_metric(score.metric)} | {' | '.join(cells)} |"


def _format(interval: Interval) -> str:
    return format_score(interval.value, interval.low, interval.high)


def write_most_different(file: Path, drift: Drift, pairs: ImagePairs) -> bool:
    """Write the pairs that differ most as one image: base, variant, and their difference times four.

    Args:
        file: .png file to write; without any difference an earlier one is removed.
        drift: the comparison.
        pairs: the compared images.

    Returns:
        Whether there was any difference to show.
    """
    if not drift.images.most_different:
        file.unlink(missing_ok=True)
        return False
    shown = ImagePairs(drift.images.most_different, pairs.base, pairs.variant)
    rows = []
    for _, first, second in shown:
        difference = ((first.int() - second.int()).abs() * DIFFERENCE_FACTOR).clamp(max=255).byte()
        factor = max(1, MIN_SIZE // min(first.shape[1:]))
        enlarged = (image.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for image in (first, second, difference))
        rows.append([image.permute(1, 2, 0).numpy() for image in enlarged])
    height, width = (max(image.shape[axis] for row in rows for image in row) + GAP for axis in (0, 1))
    sheet = np.full((len(rows) * height - GAP, 3 * width - GAP, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            sheet[top * height : top * height + image.shape[0], left * width : left * width + image.shape[1]] = image
    Image.fromarray(sheet).save(file)
    return True
