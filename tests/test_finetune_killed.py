"""kill -9 during the training and the sweep of fine-tuned networks: the same command ends with the same tables."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from isocost.config.study_yaml import dump_study
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sweep.schema import HARDWARE_COLUMNS
from test_distillation_study import distill_study
from test_dreambooth import dreambooth_study
from test_pipeline import start
from test_superres import superres_study

PARTS = {"superres": superres_study, "dreambooth": dreambooth_study, "distill": distill_study}


@pytest.mark.slow
@pytest.mark.parametrize("task", PARTS)
def test_a_study_killed_at_random_moments_ends_with_the_same_tables(task: str, tmp_path: Path) -> None:
    study = PARTS[task]()
    uninterrupted = Pipeline(study, tmp_path / "uninterrupted")
    started = time.monotonic()
    assert uninterrupted.run()
    seconds = time.monotonic() - started
    report(uninterrupted)
    file, out, moments = tmp_path / "study.yaml", tmp_path / "killed", random.Random(0)
    file.write_text(dump_study(study))
    assert yaml.safe_load(file.read_text())[task]
    kills = 0
    while kills < 8:
        process = start(file, out)
        try:
            process.wait(moments.uniform(4, 4 + seconds / 2))
            break  # it ended between two kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 2
    last = start(file, out)
    assert last.communicate(timeout=900)[0]
    assert last.returncode == 0
    for name in ("table.parquet", f"table-{task}.parquet"):
        left, right = (pd.read_parquet(folder / name).drop(columns=HARDWARE_COLUMNS) for folder in (uninterrupted.out, out))
        pd.testing.assert_frame_equal(left, right)
