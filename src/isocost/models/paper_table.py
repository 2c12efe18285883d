"""Table 1 of arXiv 2404.01367 (v2) as data."""

from __future__ import annotations

from dataclasses import dataclass

PAPER_LATENT_CHANNELS = 4
PAPER_LATENT_SIZE = 64
PAPER_CROSS_ATTENTION_DIM = 1024
PAPER_NUM_TOKENS = 77
PAPER_SHAPE = (PAPER_LATENT_CHANNELS, PAPER_LATENT_SIZE, PAPER_CROSS_ATTENTION_DIM, PAPER_NUM_TOKENS)
REFERENCE_WIDTH = 320


@dataclass(frozen=True)
class PaperRow:
    """One size of Table 1.

    Costs are of the U-Net for one 64x64x4 latent. FID and CLIP score are on COCO-2014 val with 30k images, DDIM, 50 steps and
    guidance 7.5.
    """

    size: str
    width: int
    gflop: float
    normalized_cost_per_step: float
    fid: float
    clip: float
    note: str = ""


MISPRINT_39M = "printed as 25.3, but its normalized cost gives 0.07 x 789.3 = 55 and the pattern of the column 56.7"

TABLE_1: tuple[PaperRow, ...] = (
    PaperRow("39M", 64, 25.3, 0.07, 25.30, 0.305, MISPRINT_39M),
    PaperRow("83M", 96, 102.7, 0.13, 24.30, 0.308),
    PaperRow("145M", 128, 161.5, 0.20, 24.18, 0.310),
    PaperRow("223M", 160, 233.5, 0.30, 23.76, 0.310),
    PaperRow("318M", 192, 318.5, 0.40, 22.83, 0.311),
    PaperRow("430M", 224, 416.6, 0.53, 22.35, 0.312),
    PaperRow("558M", 256, 527.8, 0.67, 22.15, 0.312),
    PaperRow("704M", 288, 652.0, 0.83, 21.82, 0.312),
    PaperRow("866M", 320, 789.3, 1.00, 21.55, 0.312),
    PaperRow("2B", 512, 1887.5, 2.39, 20.98, 0.312),
    PaperRow("5B", 768, 4082.6, 5.17, 20.14, 0.314),
)

BY_WIDTH = {row.width: row for row in TABLE_1}
BY_SIZE = {row.size: row for row in TABLE_1}
