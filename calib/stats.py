"""What was measured while clips went through a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.calib.calls import Samples

__all__ = ["NEEDS", "Stats"]

# The statistics that a pass can ask for.
NEEDS = frozenset({"input_amax", "input_channel_amax", "outputs"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """Statistics of layers, by the layers' full names.

    A statistic that nobody asked for is an empty dictionary; a layer that the clips never reached
    is absent from it.

    Attributes:
        num_clips: clips that went through the model.
        calib_sha256: digest of these clips.
        calls: how often each layer was called; 0 where it was never reached.
        input_amax: largest absolute value of the layer's first input.
        input_channel_amax: the same for each input channel, `[channels]` float32 on the CPU.
        outputs: what the model made of each clip, `[num_clips, ...]` on the CPU; None where nobody
            asked or where it is too large to keep.
    """

    num_clips: int
    calib_sha256: str
    calls: dict[str, int]
    input_amax: dict[str, float]
    input_channel_amax: dict[str, torch.Tensor]
    outputs: torch.Tensor | None = None

    @classmethod
    def nothing(cls, clips: Samples) -> Stats:
        """What stands in where no pass needs a statistic of `clips`: no layer was watched."""
        return cls(
            num_clips=len(clips),
            calib_sha256=clips.digest,
            calls={},
            input_amax={},
            input_channel_amax={},
        )
