"""The first evaluation of an image, computed once and shared by every point that starts there.

At pure noise the network's raw output depends on the start noise, the caption and the first timestep alone: points that
differ in guidance, in the solver or in the number of steps share it where their grids start together, as trailing ones do.
"""

from __future__ import annotations

from torch import Tensor

from isocost.sampling.request import Conditioning, Pass, SampleRequest

Key = tuple[int, int, float, Pass, float]


class FirstStepCache:
    """Outputs by key, the first ones that `capacity` bytes hold."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._outputs: dict[Key, Tensor] = {}
        self._num_bytes = 0

    @staticmethod
    def keys(row: SampleRequest, conditions: Conditioning) -> tuple[Key, ...]:
        """What the row's passes at its first line depend on: seed, image, timestep, caption, embedded guidance (the side of
        guidance too, because it decides the place in the call, and with it the last bits)."""
        weight = row.guidance if conditions.embeds_guidance else 1.0
        at = (row.seed, row.sample_index, float(row.table.timesteps[0]))
        return tuple((*at, one, weight) for one in conditions.passes(row))

    def has(self, keys: tuple[Key, ...]) -> bool:
        """True where all passes are there."""
        return all(key in self._outputs for key in keys)

    def get(self, keys: tuple[Key, ...]) -> tuple[Tensor, ...]:
        """Their outputs, each [C, H, W]."""
        return tuple(self._outputs[key] for key in keys)

    def keep(self, keys: tuple[Key, ...], outputs: tuple[Tensor, ...]) -> None:
        """Remember copies of the outputs while there is room."""
        for key, output in zip(keys, outputs, strict=False):
            size = output.numel() * output.element_size()
            if key not in self._outputs and self._num_bytes + size <= self.capacity:
                self._outputs[key] = output.clone()
                self._num_bytes += size
