"""Temporal sampling: after some blocks have mixed time, a few frames speak for all.

Source: the test-time sampling of STORM (Jiang et al., 2025, arXiv:2503.04130), written from the
paper: behind a temporal encoder every k-th frame stays, at equal distances.
What we changed: the number of frames is free, each the middle one of its share of the clip; a frame
that stays takes over the size of those that it stands for (the nearest ones), so that pooling and
proportional attention still count every moment. Its tokens are not averaged with theirs.

Which frames stay depends on no data: the indices are constants of the graph.

Shapes: T frames, K of them kept, L places.
"""

from __future__ import annotations

import torch

from vcompress.compress.tokens.techniques.frames import WholeFrames

__all__ = ["reduce", "sampled_times"]


def sampled_times(num_frames: int, keep: int) -> list[int]:
    """The middle frame of each of `keep` equal shares; of two middle ones the later."""
    return [(2 * share + 1) * num_frames // (2 * keep) for share in range(keep)]


def reduce(like: torch.Tensor, num_frames: int, keep: int) -> WholeFrames:
    """Keep `keep` of `num_frames` frames.

    Args:
        like: tokens `[B, T L, C]`; only their shape and device count.
        num_frames: T.
        keep: K, at least 1.
    """
    kept = sampled_times(num_frames, keep)
    source = [time for time in range(num_frames) if time not in kept]
    # Of two that are equally near the earlier.
    target = [min(range(keep), key=lambda slot: abs(kept[slot] - time)) for time in source]
    kept_index, source_index, target_index = (
        torch.tensor(index, dtype=torch.int64, device=like.device).expand(like.shape[0], -1)
        for index in (kept, source, target)
    )
    return WholeFrames(
        kept=kept_index, source=source_index, target=target_index,
        num_places=like.shape[1] // num_frames, averages=False,
    )  # fmt: skip
