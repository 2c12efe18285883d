"""Names and limits that several configuration modules share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

NUM_TRAIN_TIMESTEPS = 1000
MAX_GUIDANCE = 1000.0
"""Largest guidance w. Samples of a far smaller w are already out of range."""
MAX_IMAGES_SEEN = 10**13
"""Largest number of images that a training sees."""
MAX_IMAGE_FILES = 10**10
"""Largest number of images of a data set."""
MAX_SAMPLES = 10**7
"""Largest number of generated or reference images of a point. Published scores use 50,000."""
MAX_TRAIN_BATCH = 2**20
"""Largest training batch over all processes, images."""
MAX_SWEEP_BATCH = 2**14
"""Largest batch of one network call, images."""
MAX_LR = 10.0
MAX_LAYERS = 64
MAX_CHANNELS = 2**16
MAX_TOKENS = 2**14
MAX_RESOLUTION = 2**14

# A seed of `torch.Generator`, of numpy's generators and of a database column; some stages use the seed after it.
Seed = Annotated[int, Field(ge=0, le=2**63 - 2)]
Guidance = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
NumSteps = Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)]
ImagesSeen = Annotated[int, Field(ge=1, le=MAX_IMAGES_SEEN)]
NumSamples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
SweepBatch = Annotated[int, Field(ge=1, le=MAX_SWEEP_BATCH)]
TrainBatch = Annotated[int, Field(ge=1, le=MAX_TRAIN_BATCH)]
LearningRate = Annotated[float, Field(gt=0, le=MAX_LR)]
Probability = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
DTypeName = Literal["fp32", "bf16"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TaskName = Literal["text2image", "seed-replicates", "superres", "dreambooth", "distill", "superres-distill"]
