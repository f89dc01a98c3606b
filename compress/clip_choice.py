"""Which calibration clips something rests on: a prediction, a fit, a judgement.

What: most clips of a trained classifier lose next to nothing, whatever is done to a layer; a few
unsure ones make up the loss. For a prediction clips are drawn with a probability that goes with the
curvature of their loss (see `losses`), and weighted by its inverse: the mean stays right, its
variance falls.
Source: importance sampling; the draw is systematic (Madow, 1949), along the order of the clips, so
that all classes of a folder are met.
What we changed: probabilities have a floor, so that no weight exceeds a few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vcompress.calib.calls import Calls, Samples
from vcompress.compress.losses import TaskLoss
from vcompress.models.calls import Batch

__all__ = ["BATCH_SIZE", "ChosenClips", "batches_of", "choose_clips", "fit_and_judge"]

BATCH_SIZE = 8
# Of the mean curvature: a clip weighs at most 1 / 0.25 as much as the mean.
_FLOOR = 0.25
_HELD_OUT_EVERY = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenClips:
    """Clips and what they stand for.

    Attributes:
        indices: among all clips.
        batches: of clips or calls.
        weights: by batch, `[b]`: the mean loss of all clips is about the mean over the chosen of
            weight times loss.
    """

    indices: list[int]
    batches: list[Batch]
    weights: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.indices)


def batches_of(clips: Samples, num_clips: int) -> list[Batch]:
    """`num_clips` of the clips, or all where there are fewer, in batches for the model."""
    # Clips of a folder stand in the order of their classes.
    return list(clips.subset(spread(len(clips), num_clips)).tensors(BATCH_SIZE))


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, or all of them, at even distances."""
    wanted = min(wanted, count)
    return [index * count // wanted for index in range(wanted)]


def fit_and_judge(clips: Samples) -> tuple[Samples, Samples | None]:
    """Two thirds of `clips` to fit, and the others to judge by; all and None, if there is one.

    Of recorded calls whole generations are held out: steps of one generation have the same prompt,
    and what was fitted to it would be judged by it.
    """
    if len(clips) < 2:
        return clips, None
    sources = clips.generations if isinstance(clips, Calls) else tuple(range(len(clips)))
    known = sorted(set(sources))
    if len(known) < 2:
        sources, known = tuple(range(len(clips))), list(range(len(clips)))
    held = set(known[1::_HELD_OUT_EVERY])
    parts = [
        [index for index, source in enumerate(sources) if (source in held) is judged]
        for judged in (False, True)
    ]
    return clips.subset(parts[0]), clips.subset(parts[1])


def choose_clips(
    clips: Samples, num_clips: int, loss: TaskLoss, outputs: torch.Tensor | None, seed: int
) -> ChosenClips:
    """`num_clips` of `clips`, or all where there are fewer.

    Args:
        outputs: of the model for all `clips`, `[len(clips), ...]`; without them, and for losses
            that are as curved everywhere, clips at even distances are taken, which weigh alike.
        seed: of the draw.
    """
    if outputs is None or loss.name != "kl_nats" or num_clips >= len(clips):
        indices, weights = spread(len(clips), num_clips), torch.ones(min(num_clips, len(clips)))
    else:
        indices, weights = _drawn(loss.curvature(outputs), num_clips, seed)
    return ChosenClips(
        indices=indices,
        batches=list(clips.subset(indices).tensors(BATCH_SIZE)),
        weights=list(torch.split(weights, BATCH_SIZE)),
    )


def _drawn(curvature: torch.Tensor, count: int, seed: int) -> tuple[list[int], torch.Tensor]:
    """`count` indices with their weights."""
    mean = curvature.mean()
    if not bool(mean.isfinite()) or not bool(mean > 0):
        indices = spread(len(curvature), count)
        return indices, torch.ones(len(indices))
    shares = (curvature.double() / mean).clamp_min(_FLOOR)
    shares /= shares.sum()
    start = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    positions = (torch.arange(count, dtype=torch.float64) + start) / count
    drawn = torch.searchsorted(shares.cumsum(0), positions).clamp_max(len(shares) - 1)
    weights = 1 / (len(shares) * shares[drawn])
    return drawn.tolist(), weights.float()
