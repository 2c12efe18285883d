"""Export of guidance: the pipeline folder of a checkpoint, that of its guide, and a README with the loop that combines them.

diffusers' pipelines take neither a guide network nor an interval of noise levels. The README has a complete loop on diffusers
alone. Where diffusers' modular guiders can express an interval, it also gives their options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from isocost.config.types import PredictionType
from isocost.diffusion.guidance import GuidanceSchedule, Interval, check_schedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.checkpoint import CheckpointInfo
from isocost.models.export_diffusers import ExportParts, load_parts, write_pipeline
from isocost.sampling.generate import schedule_of
from isocost.sampling.guides import check_pair, weights_of_evaluations
from isocost.sampling.latency import NO_GUIDE
from isocost.sampling.request import SampleRequest
from isocost.utils.output_paths import check_output_folder, check_separate, private_folder

DEFAULT_GUIDANCE = 2.0
GUIDE_FOLDER, README = "guide", "README.md"
FRACTION_DIGITS = 4


def export_pair(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    guide: str | Path | None = None,
    guide_null_prompt: bool = False,
    guidance: float | None = None,
    guidance_interval: Interval | None = None,
    guidance_schedule: GuidanceSchedule | None = None,
    num_steps: int | None = None,
) -> Path:
    """Write a pipeline folder, the pipeline folder of its guide in `guide/`, and `README.md` into a new folder.

    The code in the README gives the latents of `isocost sample` from the same noise.

    Args:
        checkpoint: checkpoint folder.
        folder: folder to create; it may exist if it is empty.
        guide: checkpoint folder of the guide; None is the network itself with the empty prompt.
        guide_null_prompt: the guide gets the empty prompt.
        guidance: w; 2 by default.
        guidance_interval: (low, high) in log-SNR; None is all noise levels.
        guidance_schedule: w by log-SNR in place of `guidance`.
        num_steps: steps of the README's loop; by default those of `isocost sample`.

    Returns:
        The folder.

    Raises:
        ConfigError: one of the two cannot be exported (`isocost.models.export_diffusers.export`), the guide does not fit, or
            the guidance has no effect or is not valid.
    """
    target = check_output_folder(folder, must_be_new=True)
    check_separate(target, checkpoint, *([] if guide is None else [guide]))
    if guide_null_prompt and guide is None:
        raise ConfigError(NO_GUIDE)
    main = load_parts(checkpoint)
    info = main.opened.info
    if info.model.embeds_guidance:
        raise ConfigError(
            f"{checkpoint}: guidance is an input of this student, so it takes no guide, interval or schedule; leave them out"
        )
    if guidance_schedule is not None:
        guidance = max(weight for _, weight in check_schedule(guidance_schedule))
    guidance = info.effective_guidance(DEFAULT_GUIDANCE if guidance is None else guidance)
    if guidance == 1:
        raise ConfigError("guidance = 1: no evaluation takes a second pass, so there is nothing to combine; give more than 1")
    num_steps, noise = info.num_steps if num_steps is None else num_steps, schedule_of(info)
    coefficients = solver_coefficients(info.solver, num_steps, noise)
    weights = weights_of_evaluations(coefficients, noise, guidance, guidance_interval, guidance_schedule)
    name = None if guide is None else GUIDE_FOLDER
    SampleRequest(0, 0, coefficients, guidance, guidance_per_evaluation=weights, guide=name)  # rejects an invalid guidance
    guide_parts = None if guide is None else load_parts(guide)
    if guide_parts is not None:
        autoencoders = {parts.opened.digest: parts.autoencoder for parts in (main, guide_parts)}
        check_pair(main.opened, guide_parts.opened, str(guide), lambda source: autoencoders[source.digest])
    readme = _readme(main, guide_parts, guide_null_prompt, guidance, guidance_interval, guidance_schedule, num_steps, weights)
    with private_folder(target) as partial:
        write_pipeline(main, partial)
        if guide_parts is not None:
            (partial / GUIDE_FOLDER).mkdir()
            write_pipeline(guide_parts, partial / GUIDE_FOLDER)
        (partial / README).write_text(readme, encoding="utf-8")
        partial.rename(target)
    return target


# --- the README ---

_UNET = '''
def load_unet(folder):
    """Return a pipeline, its function prompts -> embeddings, and its function latents, timestep, embeddings -> output."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    encode = lambda prompts: pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    predict = lambda latents, timestep, embeds: pipeline.unet(latents, timestep, embeds).sample
    return pipeline, encode, predict
'''
_TRANSFORMER = '''
def load_transformer(folder):
    """Return a pipeline, its function prompts -> embeddings, and its function latents, timestep, embeddings -> output."""
    pipeline = PixArtAlphaPipeline.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    encoder = AutoModel.from_pretrained(f"{folder}/text_encoder").eval()

    def encode(prompts):
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask if encoder.config.use_attention_mask else None
        return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state

    def predict(latents, timestep, embeds):
        timesteps, sizes = timestep.expand(len(latents)), {"resolution": None, "aspect_ratio": None}
        return pipeline.transformer(latents, embeds, timesteps, added_cond_kwargs=sizes).sample

    return pipeline, encode, predict
'''
_CLEAN = {
    "epsilon": "(latents - sigma * output) / alpha",
    "v_prediction": "alpha * latents - sigma * output",
    "sample": "output",
}
"""The clean latent of a prediction of each type."""
_FROM_CLEAN = {
    "epsilon": "(latents - alpha * clean) / sigma",
    "v_prediction": "(alpha * latents - clean) / sigma",
    "sample": "clean",
}
"""The prediction of each type that belongs to a clean latent."""


def _readme(
    main: ExportParts,
    guide: ExportParts | None,
    null_prompt: bool,
    guidance: float,
    interval: Interval | None,
    schedule: GuidanceSchedule | None,
    num_steps: int,
    weights: Sequence[float],
) -> str:
    info = main.opened.info
    title = info.label if guide is None else f"{info.label}, guided by {guide.opened.info.label}"
    prompt = "the empty prompt" if null_prompt or guide is None else "the same prompt"
    if guide is None:
        second = f"The second pass of guidance is the network itself with {prompt}."
    else:
        second = f"`guide/` is the pipeline of the guide, a second network. It runs the second pass of guidance with {prompt}."
    where = "at every step"
    if interval is not None:
        where = f"where {_bounds('log-SNR', interval)}; the other steps take one pass"
    scale = f"w = {guidance:g}" if schedule is None else "w is a piecewise-linear function of the log-SNR"
    parts = [
        f"# {title}\n",
        f"This folder is a diffusers pipeline. {second} The pipelines of diffusers do not combine the passes in this way. This "
        f"loop does: `second + w (network - second)`. Here {scale}, {where}. The log-SNR of a timestep is "
        "`log(alpha^2 / sigma^2)`, from the noise schedule of the scheduler.\n",
        "Run it in this folder. `sample` gives the latents of `isocost sample` from the same noise.\n",
        f"```python\n{_code(info, guide, null_prompt, guidance, interval, schedule, num_steps)}```\n",
    ]
    if guide is None:
        parts.append(_guider(guidance, schedule, weights))
    return "\n".join(parts)


def _code(
    info: CheckpointInfo,
    guide: ExportParts | None,
    null_prompt: bool,
    guidance: float,
    interval: Interval | None,
    schedule: GuidanceSchedule | None,
    num_steps: int,
) -> str:
    """The complete loop."""
    guide_info = None if guide is None else guide.opened.info
    kinds = {item.model.kind for item in (info, guide_info) if item is not None}
    pipelines = [name for kind, name in (("unet", "StableDiffusionPipeline"), ("dit", "PixArtAlphaPipeline")) if kind in kinds]
    lines = ["import math", "", *(["import numpy as np"] if schedule is not None else []), "import torch"]
    lines += [f"from diffusers import {', '.join(sorted(pipelines))}"]
    lines += ["from transformers import AutoModel, AutoTokenizer"] if "dit" in kinds else []
    lines += ["", f"NUM_STEPS = {num_steps}"]
    if schedule is None:
        lines += [f"GUIDANCE = {guidance!r}"]
    else:
        lines += [f"LOG_SNRS = {[float(level) for level, _ in schedule]}", f"GUIDANCES = {[float(w) for _, w in schedule]}"]
    lines += [""]
    text = "\n".join(lines)
    text += "".join(["\n" + block for kind, block in (("unet", _UNET), ("dit", _TRANSFORMER)) if kind in kinds])
    text += f'\n\nnetwork, encode, predict = {_loader(info)}(".")\n'
    if guide_info is not None:
        text += f'guide, encode_guide, predict_guide = {_loader(guide_info)}("{GUIDE_FOLDER}")\n'
    text += f"scheduler = network.scheduler\n{_weight_function(info, interval, schedule)}"
    if guide_info is not None and guide_info.prediction_type != info.prediction_type:
        text += _conversion(guide_info.prediction_type, info.prediction_type)
    return text + _loop(info, guide_info, null_prompt)


def _loader(info: CheckpointInfo) -> str:
    return "load_unet" if info.model.kind == "unet" else "load_transformer"


def _bounds(name: str, interval: Interval) -> str:
    low, high = interval
    if low is None:
        return f"{name} < {high:g}" if high is not None else f"{name} is any number"
    return f"{low:g} <= {name}" + ("" if high is None else f" < {high:g}")


def _weight_function(info: CheckpointInfo, interval: Interval | None, schedule: GuidanceSchedule | None) -> str:
    weight = "GUIDANCE" if schedule is None else "float(np.interp(log_snr, LOG_SNRS, GUIDANCES))"
    if interval is not None and interval != (None, None):
        low, high = interval
        test = "log_snr" if low is None else f"{low!r} <= log_snr"
        weight += f" if {test if high is None else f'{test} < {high!r}'} else 1.0"
    if info.prediction_type == "flow_prediction":
        ratio = ["    sigma = float(timestep) / scheduler.config.num_train_timesteps", "    snr = ((1 - sigma) / sigma) ** 2"]
    else:
        ratio = [
            "    alpha_squared = float(scheduler.alphas_cumprod[int(timestep)])",
            "    snr = alpha_squared / (1 - alpha_squared)",
        ]
    return "\n".join(
        [
            "",
            "",
            "def weight(timestep):",
            '    """w at a timestep; 1 takes one pass."""',
            *ratio,
            "    log_snr = math.log(snr) if snr > 0 else -math.inf",
            f"    return {weight}",
            "",
        ]
    )


def _conversion(guide: PredictionType, main: PredictionType) -> str:
    return f'''

def as_network_predicts(output, latents, timestep):
    """Convert the guide's output ({guide}) to the prediction type of the network ({main})."""
    alpha_squared = scheduler.alphas_cumprod[int(timestep)]
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    clean = {_CLEAN[guide]}
    return {_FROM_CLEAN[main]}
'''


def _loop(info: CheckpointInfo, guide: CheckpointInfo | None, null_prompt: bool) -> str:
    encode, predict = ("encode", "predict") if guide is None else ("encode_guide", "predict_guide")
    texts = '[""] * len(prompts)' if guide is None or null_prompt else "prompts"
    converts = guide is not None and guide.prediction_type != info.prediction_type
    is_flow = info.prediction_type == "flow_prediction"
    timesteps = "sigmas=[1 - step / NUM_STEPS for step in range(NUM_STEPS)]" if is_flow else "NUM_STEPS"
    second = f"{predict}(latents, timestep, second_embeds)"
    model, (channels, size) = info.model, (info.model.latent_channels, info.model.latent_size)
    assert model.extra_input_channels == 0, "super-resolution has no pipeline"
    return f'''

@torch.no_grad()
def sample(prompts, latents):
    """Prompts and noise [N, {channels}, {size}, {size}] to latents of the same shape."""
    embeds, second_embeds = encode(prompts), {encode}({texts})
    scheduler.set_timesteps({timesteps})
    for timestep in scheduler.timesteps:
        w, output = weight(timestep), predict(latents, timestep, embeds)
        if w != 1:
            second = {f"as_network_predicts({second}, latents, timestep)" if converts else second}
            output = second + w * (output - second)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


prompts = ["a red circle on a white background"]
noise = torch.randn(len(prompts), {channels}, {size}, {size}, generator=torch.Generator().manual_seed(0))
latents = sample(prompts, noise)
with torch.no_grad():
    images = network.vae.decode(latents / network.vae.config.scaling_factor).sample
for number, image in enumerate(network.image_processor.postprocess(images)):
    image.save(f"{{number}}.png")
'''


def _guider(guidance: float, schedule: GuidanceSchedule | None, weights: Sequence[float]) -> str:
    """The options of diffusers' modular guider for the steps with guidance, where it can express them."""
    heading = "## With a guider of diffusers\n\n"
    if schedule is not None:
        return f"{heading}The guiders take one number as `guidance_scale`, so they cannot express this schedule.\n"
    guided = [step for step, weight in enumerate(weights) if weight != 1]
    num_steps = len(weights)
    if not guided:
        return f"{heading}With {num_steps} steps, no step lies in the interval, so every step takes one pass.\n"
    start, stop = (guider_fraction(step, num_steps) for step in (guided[0], guided[-1] + 1))
    return (
        f"{heading}The modular pipelines of diffusers take a guider. With {num_steps} steps of the scheduler in this folder, "
        f"this one guides the same steps, {guided[0] + 1} to {guided[-1] + 1}:\n\n"
        "```python\nfrom diffusers import ClassifierFreeGuidance\n\n"
        f"guider = ClassifierFreeGuidance(guidance_scale={guidance!r}, start={start!r}, stop={stop!r})\n```\n\n"
        f"`start` and `stop` are fractions of the steps. They mean these noise levels with {num_steps} steps alone; another "
        "number of steps or another spacing needs other fractions.\n"
    )


def guider_fraction(step: int, num_steps: int) -> float:
    """The fraction of diffusers' guiders that means a step: the smallest one with few digits and `int(fraction n) == step`.

    Args:
        step: from 0 to `num_steps`.
        num_steps: n.
    """
    unit = 10**FRACTION_DIGITS
    numerator = math.ceil(unit * step / num_steps)
    while int(numerator / unit * num_steps) < step:  # the product of floats can be rounded to below a whole number
        numerator += 1
    fraction = numerator / unit
    assert int(fraction * num_steps) == step, "there are at most 1000 steps"
    return fraction
