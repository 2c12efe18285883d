"""Noise schedules: the mixing of latents and noise at every training timestep.

The forward process is `x_t = alpha_t x0 + sigma_t noise`: variance preserving (Ho et al., arXiv 2006.11239, eq. 4:
`alpha_t^2 + sigma_t^2 = 1`) or a straight flow (Lipman et al., arXiv 2210.02747: `alpha_t + sigma_t = 1`).

Shape letters: T training timesteps, B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isocost.config.pretrained import NoiseSpec
from isocost.config.types import NUM_TRAIN_TIMESTEPS, PredictionType
from isocost.errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete noise schedule, from nearly clean (index 0) to nearly pure noise (index T - 1).

    A schedule equals only itself. The cached constructors below return the same object for the same arguments.

    Attributes:
        alpha, sigma: float64 [T], `x_t = alpha x0 + sigma noise`; alpha falls within [0, 1), sigma rises within (0, 1].
        timesteps: float64 [T], the network's input at each index.
        set_alpha_to_one: DDIM's last step ends at the clean latent, not at index 0 (as in diffusers).

    Raises:
        ConfigError: alpha or sigma is outside its range, or not monotonic.
    """

    alpha: Floats
    sigma: Floats
    timesteps: Floats
    set_alpha_to_one: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "timesteps"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        falls = np.all(np.diff(self.alpha) < 0) and np.all(np.diff(self.sigma) > 0)
        inside = self.alpha.size and 0 <= self.alpha[-1] <= self.alpha[0] < 1 and 0 < self.sigma[0] <= self.sigma[-1] <= 1
        if not (falls and inside):
            raise ConfigError("a noise schedule needs alpha that falls within [0, 1) and sigma that rises within (0, 1]")

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: NDArray[np.floating], set_alpha_to_one: bool = False) -> NoiseSchedule:
        """The variance-preserving schedule of `alphas_cumprod` [T] (diffusers' name for alpha^2).

        Raises:
            ConfigError: the values do not fall, or are outside [0, 1).
        """
        values = np.asarray(alphas_cumprod, dtype=np.float64)
        if values.ndim != 1 or not values.size or np.any(np.diff(values) >= 0) or not 0 <= values[-1] <= values[0] < 1:
            raise ConfigError("alphas_cumprod must be strictly decreasing, with all values in [0, 1)")
        return NoiseSchedule(np.sqrt(values), np.sqrt(1 - values), np.arange(len(values), dtype=np.float64), set_alpha_to_one)

    @staticmethod
    @lru_cache(maxsize=64)
    def scaled_linear(
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_timesteps: int = NUM_TRAIN_TIMESTEPS,
        rescale_betas_zero_snr: bool = False,
    ) -> NoiseSchedule:
        """Stable Diffusion's schedule: the square roots of the betas rise linearly (arXiv 2112.10752, released configs).

        With `rescale_betas_zero_snr` alpha is shifted and scaled so that it ends at 0 and keeps its first value (Lin et al.,
        arXiv 2305.08891, algorithm 1).
        """
        sqrt_betas: Floats = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps)
        alphas_cumprod = np.cumprod(1 - sqrt_betas**2, dtype=np.float64)
        return NoiseSchedule.from_alphas_cumprod(
            _rescale_zero_terminal_snr(alphas_cumprod) if rescale_betas_zero_snr else alphas_cumprod
        )

    @staticmethod
    @lru_cache(maxsize=64)
    def flow(shift: float = 1.0, num_timesteps: int = NUM_TRAIN_TIMESTEPS) -> NoiseSchedule:
        """Flow matching: sigma = s / T for s = 1 to T, shifted by `apply_time_shift`; the network's input is T sigma.

        Raises:
            ConfigError: shift is not positive.
        """
        if not shift > 0:
            raise ConfigError(f"shift = {shift}: give a shift above 0")
        sigma = apply_time_shift(np.arange(1, num_timesteps + 1) / num_timesteps, shift)
        return NoiseSchedule(1 - sigma, sigma, sigma * num_timesteps)

    @staticmethod
    @lru_cache(maxsize=64)
    def from_spec(spec: NoiseSpec) -> NoiseSchedule:
        """The schedule of a published checkpoint, computed as diffusers' schedulers do from the same fields.

        `squaredcos_cap_v2` is the cosine schedule of arXiv 2102.09672, eq. 17, with betas up to 0.999.

        Raises:
            ConfigError: the fields give no valid schedule.
        """
        if spec.kind == "flow":
            return NoiseSchedule.flow(spec.shift, spec.num_timesteps)
        start, end, number = spec.beta_start, spec.beta_end, spec.num_timesteps
        betas: Floats
        if spec.kind == "linear":
            betas = np.linspace(start, end, number)
        elif spec.kind == "scaled_linear":
            betas = np.linspace(math.sqrt(start), math.sqrt(end), number) ** 2
        else:
            alpha_bar = np.cos((np.arange(number + 1) / number + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
        alphas_cumprod = np.cumprod(1 - betas, dtype=np.float64)
        if spec.rescale_betas_zero_snr:
            alphas_cumprod = _rescale_zero_terminal_snr(alphas_cumprod)
        return NoiseSchedule.from_alphas_cumprod(alphas_cumprod, spec.set_alpha_to_one)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    @property
    def alphas_cumprod(self) -> Floats:
        """alpha^2, float64 [T]."""
        return self.alpha**2

    @cached_property
    def is_flow(self) -> bool:
        """True if `alpha + sigma = 1`."""
        return bool(np.allclose(self.alpha + self.sigma, 1, rtol=0, atol=1e-12))

    @property
    def has_zero_terminal_snr(self) -> bool:
        """True if the last index is pure noise (zero terminal SNR, flows)."""
        return bool(self.alpha[-1] == 0)

    def add_noise(self, x0: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """`alpha x0 + sigma noise` for x0 and noise [B, ...] at schedule indices int64 [B]."""
        alpha, sigma = _gather(self, indices, x0)
        return alpha * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """`alpha noise - sigma x0` (Salimans & Ho, arXiv 2202.00512, section 4)."""
        alpha, sigma = _gather(self, indices, x0)
        return alpha * noise - sigma * x0

    def training_target(self, prediction_type: PredictionType, x0: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """The training target of a network of this prediction type, [B, ...].

        Raises:
            ConfigError: unknown prediction type.
        """
        _check_prediction(prediction_type)
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "flow_prediction":
            return noise - x0
        return x0 if prediction_type == "sample" else self.velocity(x0, noise, indices)

    def predicted_x0(self, prediction_type: PredictionType, output: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """The clean latent predicted by a network's output; output and x [B, ...], indices int64 [B].

        Raises:
            ConfigError: unknown prediction type.
        """
        host_indices = indices.cpu().numpy()
        from_x, from_output = (
            torch.from_numpy(values).to(x).view(-1, *[1] * (x.ndim - 1))
            for values in x0_coefficients(prediction_type, self.alpha[host_indices], self.sigma[host_indices])
        )
        return from_x * x + from_output * output


def _rescale_zero_terminal_snr(alphas_cumprod: Floats) -> Floats:
    """Shift and scale alpha so that it ends at 0 and keeps its first value (arXiv 2305.08891, algorithm 1)."""
    alpha = np.sqrt(alphas_cumprod)
    values: Floats = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    return values


def apply_time_shift(sigma: Floats, shift: float) -> Floats:
    """`shift sigma / (1 + (shift - 1) sigma)`, the shift for higher resolutions (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def x0_coefficients(prediction_type: PredictionType, alpha: Floats, sigma: Floats) -> tuple[Floats, Floats]:
    """Float64 (p, q) of alpha's shape with `x0 = p x + q output` for a state `x = alpha x0 + sigma noise`.

    epsilon: arXiv 2006.11239, eq. 15; v: arXiv 2202.00512, section 4; flow (output = noise - x0): arXiv 2210.02747, eq. 23.

    Raises:
        ConfigError: unknown prediction type, or epsilon at alpha = 0 (pure noise contains no information about x0).
    """
    _check_prediction(prediction_type)
    if prediction_type == "epsilon":
        if np.any(alpha == 0):
            raise ConfigError("prediction type epsilon cannot start from zero terminal SNR; train and sample with v_prediction")
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        scale = alpha**2 + sigma**2
        return alpha / scale, -sigma / scale
    if prediction_type == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    return np.zeros_like(alpha), np.ones_like(alpha)


def _check_prediction(prediction_type: str) -> None:
    if prediction_type not in get_args(PredictionType):
        raise ConfigError(f"prediction type {prediction_type!r}: choose one of {', '.join(get_args(PredictionType))}")


def _gather(schedule: NoiseSchedule, indices: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = _on_device(schedule, like.device)
    shape = (-1,) + (1,) * (like.ndim - 1)
    indices = indices.to(like.device)
    return alpha[indices].to(like.dtype).view(shape), sigma[indices].to(like.dtype).view(shape)


@lru_cache(maxsize=16)
def _on_device(schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(schedule.alpha, device=device), torch.tensor(schedule.sigma, device=device)
