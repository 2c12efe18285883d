"""Read the bootstrap resamples of an output folder's points, without a change to the folder."""

from __future__ import annotations

from pathlib import Path

from isocost.analysis.results_table import REPORT_DATA, RESAMPLES
from isocost.metrics.arrays import Array
from isocost.pipeline.pipeline import RESULTS_DB_FILE
from isocost.sweep.results_db import ResultsDB
from isocost.utils.tensor_files import read_metadata, read_tensors


def read_resamples(out: Path, metric: str) -> dict[str, Array]:
    """Read the resamples of the points of an output folder or an archive by one metric.

    They come from the results database in the folder. A study with a database elsewhere has none there; its reports saved the
    resamples by the metric that ranks the points.

    Args:
        out: the folder.
        metric: the column of the scores.

    Returns:
        Point -> float64 [1 + R]; empty if there are none.
    """
    file = out / RESULTS_DB_FILE
    if file.is_file():
        with ResultsDB(file, keep_tables=True, read_only=True) as database:
            return database.resamples_of_metric(metric, database.points())
    resamples: dict[str, Array] = {}
    for saved in sorted((out / REPORT_DATA).glob(f"*/{RESAMPLES}")):
        if read_metadata(saved).get("metric") == metric:
            resamples |= {point: values.numpy() for point, values in read_tensors(saved).items()}
    return resamples
