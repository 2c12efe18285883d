"""A cache of first evaluations: all points that start an image in the same way share one network evaluation.

At pure noise the raw output of the network depends only on the initial noise, the prompt and the first timestep. Points that
differ in guidance, solver or number of steps share it if their timesteps start equally, as trailing timesteps do.
"""

from __future__ import annotations

from torch import Tensor

from isocost.sampling.request import Conditioning, ConditioningPass, SampleRequest

Key = tuple[int, int, float, ConditioningPass, float]


class FirstStepCache:
    """Network outputs by key. It stores outputs until `capacity` bytes are used; later outputs are not stored."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._outputs: dict[Key, Tensor] = {}
        self._num_bytes = 0

    @staticmethod
    def keys(request: SampleRequest, conditioning: Conditioning) -> tuple[Key, ...]:
        """One key per pass of the first step: seed, sample index, timestep, network, prompt and embedded guidance.

        The key also holds whether the pass is unconditional, because this decides its position in the call, and with it the
        last bits of the output.
        """
        first_weight = request.weights[0]
        embedded_weight = first_weight if conditioning.embeds_guidance else 1.0
        start = (request.seed, request.sample_index, float(request.coefficients.timesteps[0]))
        return tuple((*start, item, embedded_weight) for item in conditioning.passes(request, first_weight))

    def has(self, keys: tuple[Key, ...]) -> bool:
        """True if the outputs of all keys are stored."""
        return all(key in self._outputs for key in keys)

    def get(self, keys: tuple[Key, ...]) -> tuple[Tensor, ...]:
        """The stored outputs, each [C, H, W]."""
        return tuple(self._outputs[key] for key in keys)

    def put(self, keys: tuple[Key, ...], outputs: tuple[Tensor, ...]) -> None:
        """Store copies of the outputs while the capacity lasts."""
        for key, output in zip(keys, outputs, strict=False):
            size = output.numel() * output.element_size()
            if key not in self._outputs and self._num_bytes + size <= self.capacity:
                self._outputs[key] = output.clone()
                self._num_bytes += size
