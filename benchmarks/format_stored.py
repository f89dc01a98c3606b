"""A quantized weight of any format and any library, in one form that can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["INT4_GROUPS", "Stored", "blocks_of"]

INT4_GROUPS = {"int4_g32": 32, "int4_g64": 64, "int4_g128": 128}


@dataclass(frozen=True)
class Stored:
    """A weight `[N, K]` after quantization; decoding its codes and scales loses nothing.

    Attributes:
        elements: float32 `[N, K]`, what the codes stand for; negative zeros keep their sign.
        scales: float32 `[N, G]`, each for K / G neighbours, or `[1, 1]`.
        tensor_scale: float32, 0-dim; 1 where the format has none.
    """

    elements: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor = field(default_factory=lambda: torch.tensor(1.0))

    def spread_scales(self) -> torch.Tensor:
        """float32 `[N, K]`: each value's scale, without that of the tensor."""
        num_rows, size = self.elements.shape
        scales = self.scales.expand(num_rows, -1)
        return scales.repeat_interleave(size // scales.shape[1], dim=1)

    def values(self) -> torch.Tensor:
        """float64 `[N, K]`, exact."""
        scales = self.spread_scales().double() * self.tensor_scale.double()
        return self.elements.double() * scales


def blocks_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    """View `weight` `[N, K]` as `[N, K / size, size]`."""
    return weight.reshape(len(weight), -1, size)
