"""Names and limits that several configuration modules share."""

from __future__ import annotations

from typing import Literal

NUM_TRAIN_TIMESTEPS = 1000
DTypeName = Literal["fp32", "bf16"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TaskName = Literal["text2image", "seed-replicates", "superres", "dreambooth", "distill", "superres-distill"]
