"""Peak memory of one image, of several images and of a sweep, next to diffusers' own pipeline; and a table for 1024 pixels.

    python benchmarks/memory.py [--quick] [--json] [--side PIXELS] [--no-sweep] [--write]

The checkpoint has a decoder of the size of Stable Diffusion's (49.5M parameters) and a small U-Net, both with random weights:
the decoder's activations are what differs. Each measurement is a process of its own. Its peak is the largest resident memory
of the process. The sweep also scores its images. The forecast of the decoder (`models/decoder_memory.py`) is compared with the
growth of the resident memory while it decodes. The last line is JSON. The target is at most 1.2 times diffusers' peak for one
image.

The table for 1024 pixels is counted on the meta device, not measured. `--write` writes it into docs/latency.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from results import Row, argument_parser, print_results, row

ROOT = Path(__file__).resolve().parents[1]
TESTS = str(ROOT / "tests")
TABLE_FILE = ROOT / "docs" / "latency.md"
TABLE_START, TABLE_END = "<!-- memory of decoders -->", "<!-- end of memory of decoders -->"
SIDES, QUICK_SIDES = (128, 256, 512), (128,)
TABLE_SIDE, TILE_SIZE = 1024, 512
MAX_RATIO = 1.2
NUM_STEPS, NUM_STREAM_IMAGES = 2, 4
NUM_SWEEP_IMAGES, SWEEP_RESOLUTION = 32, 32
DECODERS = {
    "Stable Diffusion 1 and 2, SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "Stable Diffusion 3, FLUX.1": "black-forest-labs/FLUX.1-dev",
    "TAESD": "madebyollin/taesd",
}
"""Published decoders by their names in the table; the autoencoders of one entry have the same shape."""
KIB, MIB = 1024, 2**20


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
    if program == "decoder":
        return measure_decoder(folder)
    if program == "sweep":
        before = peak_mib()
        sweep(folder, num_images)
    elif program == "isocost":
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


def sweep(folder: Path, num_images: int) -> None:
    """Sample and score one point. The images are reduced to 32 x 32 pixels for the scores."""
    import isocost

    study = isocost.Study.from_dict(
        {
            "name": "memory",
            "data": {"resolution": SWEEP_RESOLUTION, "reference": {"kind": "scenes", "num_images": 64, "seed": 1}},
            "checkpoints": [str(folder)],
            "sweep": {"num_steps": [NUM_STEPS], "guidance": [2]},
            "protocol": {"num_images": num_images, "num_reference": 64, "num_bootstrap": 20},
        }
    )
    with tempfile.TemporaryDirectory() as out:
        isocost.run(study, Path(out) / "out", device="cpu", figure_formats=())


def measure_decoder(folder: Path) -> dict[str, float]:
    """Growth of the resident memory while one image is decoded, and the count of its activations."""
    import torch

    from isocost.models.autoencoder import load_autoencoder
    from isocost.models.decoder_memory import decoder_bytes
    from isocost.models.pretrained.files import read_config
    from isocost.utils.device import HostMonitor

    config = read_config(folder / "vae" / "config.json")
    autoencoder = load_autoencoder(folder / "vae")
    autoencoder.decode(torch.randn(1, autoencoder.latent_channels, 4, 4))  # loads the weights and the libraries
    monitor = HostMonitor()
    monitor.reset_peak()
    before = monitor.memory_bytes()
    side = config["sample_size"]
    autoencoder.decode(torch.randn(1, autoencoder.latent_channels, side // autoencoder.factor, side // autoencoder.factor))
    peak = monitor.peak_bytes()
    assert before is not None, "the benchmark runs on Linux"
    assert peak is not None, "the benchmark runs on Linux"
    return {"peak_mib": (peak - before) / MIB, "counted_mib": decoder_bytes(config, side) / MIB}


def decoder_rows(with_tiles: bool = True) -> list[list[str]]:
    """Memory of decoders that are published, by counts on the meta device: cells of a table."""
    import torch

    from isocost.config.sampling import VaeSpec
    from isocost.estimate.component_shapes import KNOWN_AUTOENCODERS
    from isocost.models.decoder_memory import autoencoder_on_meta, decoder_bytes
    from isocost.models.memory import weight_bytes

    rows = []
    for title, name in DECODERS.items():
        config = KNOWN_AUTOENCODERS[name][1]
        num_bytes = weight_bytes(autoencoder_on_meta(config).decoder, torch.float32)
        cells = [title, f"{num_bytes / MIB:,.0f}"]
        for tile_size in (None, TILE_SIZE) if with_tiles else (None,):
            for dtype in ("fp32", "bf16"):
                num_bytes = decoder_bytes(config, TABLE_SIDE, 1, VaeSpec(dtype=dtype, tile_size=tile_size))
                cells.append(f"{num_bytes / MIB:,.0f}")
        rows.append(cells)
    return rows


def decoder_table() -> str:
    """The table of `decoder_rows` as Markdown."""
    head = [
        "autoencoder",
        "weights of the decoder, fp32",
        "whole, fp32",
        "whole, bf16",
        f"tiles of {TILE_SIZE}, fp32",
        f"tiles of {TILE_SIZE}, bf16",
    ]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in decoder_rows())])


def write_table() -> None:
    """Replace the table in docs/latency.md."""
    text = TABLE_FILE.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    TABLE_FILE.write_text(f"{before}{TABLE_START}\n{decoder_table()}\n{TABLE_END}{after}", encoding="utf-8")


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
    parser = argument_parser(__doc__, "128 px only, without the sweep and the table")
    parser.add_argument("--side", type=int, action="append", help="side of the images in pixels; may be repeated")
    parser.add_argument("--no-sweep", action="store_true", help="without the sweep, which decodes 43 images")
    parser.add_argument("--write", action="store_true", help="only count the table for 1024 px and write it to docs/latency.md")
    options = parser.parse_args()
    if options.write:
        write_table()
        return
    rows: list[Row] = []
    targets: list[Row] = []
    for side in QUICK_SIDES if options.quick else options.side or SIDES:
        rows_of_side, target = measure_side(side, not options.quick and not options.no_sweep, options.json)
        rows += rows_of_side
        targets.append(target)
    if not options.quick and not options.json:
        print(decoder_table(), flush=True)
    print_results("memory", rows, targets)


def measure_side(side: int, with_sweep: bool, quiet: bool) -> tuple[list[Row], Row]:
    """Rows of one size of images, and the target for one image."""
    rows, peaks = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        write_pipeline(folder, side)
        runs = [("diffusers", 1), ("isocost", 1), ("isocost", NUM_STREAM_IMAGES)]
        runs += [("sweep", NUM_SWEEP_IMAGES)] if with_sweep else []
        for program, num_images in runs:
            peaks.append(in_process(program, folder, num_images)["peak_mib"])
            rows.append(row(f"{program}, {side} px, {num_images} images", [peaks[-1]], "MiB"))
            if not quiet:
                print(
                    f"{program:10} {side:5} px {num_images:3} images {peaks[-1]:7.0f} MiB  {peaks[-1] / peaks[0]:.2f}",
                    flush=True,
                )
        decoder = in_process("decoder", folder, 1)
    for kind, key in (("measured", "peak_mib"), ("counted", "counted_mib")):
        rows.append(row(f"decoder activations, {side} px, {kind}", [decoder[key]], "MiB"))
    if not quiet:
        print(
            f"decoder    {side:5} px measured {decoder['peak_mib']:.0f} MiB, counted {decoder['counted_mib']:.0f}", flush=True
        )
    ratio = peaks[1] / peaks[0]
    return rows, {"what": rows[1]["what"], "value": ratio, "target": f"<= {MAX_RATIO}", "met": ratio <= MAX_RATIO}


if __name__ == "__main__":
    main()
