"""Protocol presets: named protocols that fix images, prompts, features and metrics, so that published numbers are comparable.

A preset that fixes its prompts contains the SHA-256 of the list of [id, prompt]. A preset that fixes its reference images
contains their number, and takes their ids from the prompt list. Any change of a preset raises its version; numbers of two
versions are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isocost.config.evaluation import ProtocolSpec
from isocost.errors import ConfigError


@dataclass(frozen=True)
class PromptList:
    """A list of prompts with ids, in order.

    Attributes:
        num: number of prompts.
        sha256: SHA-256 of the JSON of [[id, prompt], ...].
        source: where to get the list, for messages.
    """

    num: int
    sha256: str
    source: str


@dataclass(frozen=True)
class Crops:
    """Square crops of real images; the position of a crop is a function of its number.

    Attributes:
        num: number of crops.
        side: height and width in pixels.
        num_sources: number of images; crop i is from image i % num_sources.
    """

    num: int
    side: int
    num_sources: int

    def corner(self, number: int, height: int, width: int) -> tuple[int, int]:
        """Top and left of crop `number` in an image of `height` x `width` pixels, drawn by Philox with the number as key."""
        generator = np.random.Generator(np.random.Philox(key=[0, number]))
        return int(generator.integers(height - self.side + 1)), int(generator.integers(width - self.side + 1))


@dataclass(frozen=True)
class ProtocolPreset:
    """A named protocol.

    Attributes:
        name: name on the command line.
        version: raised by every change.
        about: one sentence for lists.
        compares: "sets" (distances between two sets), "pairs" (each image with the reference of the same name, and the
            sets) or "subjects" (DreamBooth: each image with the photographs of its subject and with its prompt).
        spec: metrics and feature extractors.
        resolution: required height and width of the images in pixels; None for any.
        num_images: required number of images; None for any.
        num_reference: required number of reference images; None for any.
        prompts: the fixed prompt list; None without prompts.
        reference_ids: the reference images are those with the ids of the prompt list.
        paired_image_metrics: metrics of each image against its original.
        crops: the reference images are these crops.
    """

    name: str
    version: int
    about: str
    compares: Literal["sets", "pairs", "subjects"]
    spec: ProtocolSpec
    resolution: int | None = None
    num_images: int | None = None
    num_reference: int | None = None
    prompts: PromptList | None = None
    reference_ids: bool = False
    paired_image_metrics: tuple[Literal["psnr", "ssim", "lpips"], ...] = ()
    crops: Crops | None = None

    @property
    def title(self) -> str:
        """Name and version, for example "coco30k-fid-clip@1"."""
        return f"{self.name}@{self.version}"


def _lite(distance: str, side: int) -> ProtocolPreset:
    metrics = ("mmd",) if distance == "mmd" else ("mmd", "frechet")
    return ProtocolPreset(
        f"{distance}-efficientnet-{side}",
        1,
        f"any images at their own size, EfficientNet-lite0 at {side} pixels, works offline",
        "sets",
        ProtocolSpec(feature_size=side, metrics=metrics),
    )


COCO_30K = PromptList(
    30_000,
    "416c9597605906c14d9ff05fb60fa91ed33600655c0d2db1b52a88583416588f",
    "coco_30k.csv (columns image_id, prompt): COCO-2014 validation captions, one for each of 30,000 images",
)
RSICD_TEST = PromptList(
    1_093,
    "95f856990b369d4ee045b298714b94829b0cb79ae8a3658d07dd7938db277254",
    "the RSICD test split as tar shards: the first caption of each image",
)
DREAMBOOTH = PromptList(
    750,
    "dc123c81ff3e0b96048ad45aa0b3a0f4b511ffc41aacdea57a982f35e57f3e72",
    "prompts_and_classes.txt of google/dreambooth: 25 prompts for each of 30 subjects, id SUBJECT/00 to SUBJECT/24",
)
SCENES = PromptList(
    256,
    "5e1696841e4ee74a1f8745f2ebffb42100bef0e07f035f7097690790c21c603f",
    "scenes:256: the first 256 scenes of seed 1, generated when needed",
)

PRESETS: dict[str, ProtocolPreset] = {
    protocol.name: protocol
    for protocol in (
        ProtocolPreset(
            "coco30k-fid-clip",
            1,
            "arXiv 2404.01367: one image for each of 30,000 COCO-2014 validation captions at 256 x 256, FID against the "
            "photographs of these captions (centre square, Lanczos), CLIP score by ViT-B/32",
            "sets",
            ProtocolSpec(
                num_images=30_000,
                features=("inception", "clip-vit-b-32"),
                metrics=("frechet", "mmd", "inception_score", "precision_recall", "prompt_similarity"),
            ),
            resolution=256,
            num_images=30_000,
            num_reference=30_000,
            prompts=COCO_30K,
            reference_ids=True,
        ),
        ProtocolPreset(
            "div2k-sr",
            1,
            "super-resolution to 512 x 512: 3,000 crops of the 100 DIV2K validation images, made by `isocost reference`; "
            "PSNR (RGB), SSIM, LPIPS of pairs, FID and Inception score of the sets",
            "pairs",
            ProtocolSpec(num_images=3_000, features=("inception",), metrics=("frechet", "mmd", "inception_score")),
            resolution=512,
            num_images=3_000,
            num_reference=3_000,
            paired_image_metrics=("psnr", "ssim", "lpips"),
            crops=Crops(num=3_000, side=512, num_sources=100),
        ),
        ProtocolPreset(
            "dreambooth-30x25",
            1,
            "arXiv 2208.12242: 30 subjects x 25 prompts x 4 images (SUBJECT/PP_K.png); CLIP-I and CLIP-T by "
            "ViT-B/32, DINO by ViT-S/16",
            "subjects",
            ProtocolSpec(num_images=3_000, features=("clip-vit-b-32", "dino-vit-s-16"), metrics=()),
            num_images=3_000,
            prompts=DREAMBOOTH,
        ),
        ProtocolPreset(
            "aerial-fd",
            1,
            "one image for each of RSICD's 1,093 test captions at 128 x 128 against the 8,734 photographs of its training "
            "split; squared MMD and Frechet distance on EfficientNet-lite0 at 128 pixels, precision and recall",
            "sets",
            ProtocolSpec(
                num_images=1_093,
                feature_size=128,
                metrics=("mmd", "frechet", "precision_recall", "density_coverage"),
            ),
            resolution=128,
            num_images=1_093,
            num_reference=8_734,
            prompts=RSICD_TEST,
        ),
        ProtocolPreset(
            "demo",
            1,
            "the embedded scenes at 32 x 32: one image for each of 256 captions against 2,000 scenes; squared MMD on "
            "EfficientNet-lite0 at 64 pixels",
            "sets",
            ProtocolSpec(num_images=256, feature_size=64, metrics=("mmd",)),
            resolution=32,
            num_images=256,
            num_reference=2_000,
            prompts=SCENES,
        ),
        *(_lite(distance, side) for distance in ("mmd", "frechet") for side in (64, 224)),
    )
}


def protocol_preset(name: str) -> ProtocolPreset:
    """The preset `name`; raises ConfigError with the known names if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"protocol '{name}': choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
