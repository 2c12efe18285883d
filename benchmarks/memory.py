"""Peak memory of one image, and of several images, next to diffusers' own pipeline.

    python benchmarks/memory.py [--quick] [--json]

The checkpoint has a decoder of the size of Stable Diffusion's (49.5M parameters) and a small U-Net, both with random weights:
the decoder's activations are what differs. Each measurement is a process of its own. Its peak is the largest resident memory
of the process. The last line is JSON. The target is at most 1.2 times diffusers' peak for one image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from results import Row, argument_parser, print_results, row

TESTS = str(Path(__file__).resolve().parents[1] / "tests")
SIDES, QUICK_SIDES = (128, 256, 512), (128,)
MAX_RATIO = 1.2
NUM_STEPS, NUM_STREAM_IMAGES = 2, 4
KIB = 1024


def write_pipeline(folder: Path, side: int) -> None:
    """Save a Stable Diffusion pipeline for images of `side` pixels: the published decoder, a U-Net of two levels."""
    sys.path.insert(0, TESTS)
    import torch
    from diffusers import StableDiffusionPipeline

    from tiny_pipelines import autoencoder, clip, clip_tokenizer, ddim, unet

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=autoencoder(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=32,
            sample_size=side,
        ),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(sample_size=side // 8),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def peak_mib() -> float:
    """Largest resident memory of this process so far, from Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / KIB


def measure(program: str, folder: Path, num_images: int) -> dict[str, float]:
    """Run in a process of its own: generate images and print the peak before and after."""
    import torch

    torch.set_num_threads(1)
    if program == "isocost":
        import isocost
        import isocost.sampling.sample

        before = peak_mib()
        isocost.load_checkpoint(folder, device="cpu").sample("a red circle", num_steps=NUM_STEPS, num_images=num_images)
    else:
        from diffusers import StableDiffusionPipeline

        before = peak_mib()
        pipeline = StableDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        for _ in range(num_images):
            pipeline("a red circle", num_inference_steps=NUM_STEPS, guidance_scale=2.0)
    return {"before_mib": before, "peak_mib": peak_mib()}


def in_process(program: str, folder: Path, num_images: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", program, str(folder), str(num_images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        program, folder, num_images = sys.argv[2:]
        print(json.dumps(measure(program, Path(folder), int(num_images))))
        return
    options = argument_parser(__doc__, "128 px only").parse_args()
    rows: list[Row] = []
    targets: list[Row] = []
    for side in QUICK_SIDES if options.quick else SIDES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            write_pipeline(folder, side)
            runs = (("diffusers", 1), ("isocost", 1), ("isocost", NUM_STREAM_IMAGES))
            peaks = [in_process(program, folder, num_images)["peak_mib"] for program, num_images in runs]
        for (program, num_images), peak in zip(runs, peaks, strict=True):
            rows.append(row(f"{program}, {side} px, {num_images} images", [peak], "MiB"))
            if not options.json:
                print(f"{program:10} {side:5} px {num_images:3} images {peak:7.0f} MiB  {peak / peaks[0]:.2f}", flush=True)
        for index in (-2, -1):
            ratio = peaks[index] / peaks[0]
            target = {"what": rows[index]["what"], "value": ratio, "target": f"<= {MAX_RATIO}", "met": ratio <= MAX_RATIO}
            targets.append(target)
    print_results("memory", rows, targets)


if __name__ == "__main__":
    main()
