"""Configuration of the image data sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isocost.config.base import Spec

# --- data -------------------------------------------------------------------------------------------------------------


class FileSource(Spec):
    """What sources of files have in common. An image's name alone decides whether it is held out, one in ten."""

    path: str
    limit: int | None = Field(None, ge=1)
    subset: Literal["all", "train", "test"] = Field("all", description="for one set of images as both train and reference")


class FolderSource(FileSource):
    """Images in a folder with `captions.jsonl` ({"file", "caption" or "captions"}) or one .txt/.json beside each image."""

    kind: Literal["folder"]


class WebdatasetSource(FileSource):
    """Tar shards of NAME.jpg|png|webp + NAME.json|txt; `path` may hold a glob (`aerial/train-*.tar`)."""

    kind: Literal["webdataset"]


class HubSource(FileSource):
    """A data set of the `datasets` library: a Hub id, or a local folder or file of Parquet with the same layout."""

    kind: Literal["hub"]
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "captions"
    label_column: str | None = None


class ScenesSource(Spec):
    """The embedded procedural images: scene `index` of `seed`, for `first <= index < first + num_images`."""

    kind: Literal["scenes"]
    num_images: int = Field(ge=1)
    first: int = Field(0, ge=0)
    seed: int = 0


SourceSpec = Annotated[FolderSource | WebdatasetSource | HubSource | ScenesSource, Field(discriminator="kind")]


class DataSpec(Spec):
    """Images with captions: what is trained on, and what generated images are compared with."""

    train: SourceSpec | None = Field(None, description="a study of given checkpoints has none")
    reference: SourceSpec
    resolution: int = Field(ge=8, description="side of the square images, pixels")
    max_unreadable_fraction: float = Field(0.01, ge=0, lt=1, description="unreadable share above which the run stops")
