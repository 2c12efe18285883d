"""Configuration of the data sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isocost.config.base import LocalPath, Spec
from isocost.config.types import MAX_IMAGE_FILES, MAX_RESOLUTION, Seed


class FileSource(Spec):
    """The common fields of file sources. A hash of the file name assigns one image in ten to the test set."""

    path: LocalPath
    limit: int | None = Field(
        None, ge=1, le=MAX_IMAGE_FILES, description="largest number of images that are read; all if absent"
    )
    subset: Literal["all", "train", "test"] = Field("all", description="`train` or `test` splits one data set by file name")


class FolderSource(FileSource):
    """Images in a folder with `captions.jsonl` ({"file", "caption" or "captions"}), one .txt or .json file per image, or the
    `metadata.jsonl` of `datasets` ({"file_name", "text"})."""

    kind: Literal["folder"]


class WebdatasetSource(FileSource):
    """Tar shards of NAME.jpg|png|webp|... + NAME.json|txt; `path` may hold a glob (`aerial/train-*.tar`)."""

    kind: Literal["webdataset"]


class HubSource(FileSource):
    """A data set of the `datasets` library: a Hub id, or a local Parquet folder or file with the same layout."""

    kind: Literal["hub"]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "captions"
    label_column: str | None = None


class ScenesSource(Spec):
    """The built-in procedural images: scene `index` of `seed` for `first <= index < first + num_images`."""

    kind: Literal["scenes"]
    num_images: int = Field(ge=1, le=MAX_IMAGE_FILES)
    first: int = Field(0, ge=0, le=MAX_IMAGE_FILES)
    seed: Seed = 0


SourceSpec = Annotated[FolderSource | WebdatasetSource | HubSource | ScenesSource, Field(discriminator="kind")]


class DataSpec(Spec):
    """Images with captions: the training set and the reference set of the metrics."""

    train: SourceSpec | None = Field(None, description="absent in a study of pretrained checkpoints")
    reference: SourceSpec
    resolution: int = Field(ge=8, le=MAX_RESOLUTION, description="size of the square images, pixels")
    max_unreadable_fraction: float = Field(
        0.01, ge=0, lt=1, description="fraction of unreadable images above which the run stops"
    )
