"""Distance of two clips as a recogniser sees them.

What: the cosine distance between what a trained recogniser computes of both, in front of its
classifier; of a model without classes, between its outputs. PSNR counts every pixel alike, a
recogniser what tells one clip from another. It is worth as much as the recogniser knows of such
clips. (Distances between distributions, such as Frechet's, need thousands of clips.)

Shapes: T frames, H W pixels, C channels; values from 0 to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from vcompress.calib.preprocess import gray_from_rgb, to_model_input
from vcompress.calib.sampling import centered_indices, crop_origin, resized_size
from vcompress.compress.tokens.readout import readout_of
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.validate.frames import Frames

__all__ = ["FeatureReader"]


class FeatureReader:
    """Features of generated clips by one recogniser."""

    def __init__(self, source: str | VideoModel) -> None:
        """Load `source`, as `load_model` does.

        Raises:
            InputError: it takes no clips, or its input is not that of RGB or gray frames.
        """
        self._model = source if isinstance(source, VideoModel) else load_model(source)
        self._readout = readout_of(self._model)
        # Says at once that a model takes no clips.
        self._spec = self._model.clip

    def __call__(self, clip: Frames) -> npt.NDArray[np.float32]:
        """The features of `clip` `[T, H, W, C]`, as one vector."""
        frames = self._input(clip)
        if self._readout is None:
            return self._model(frames)[0].float().flatten().numpy()
        kept: list[torch.Tensor] = []

        def keep(_layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            kept.append(inputs[0])

        handle = self._model.layer(self._readout).register_forward_pre_hook(keep)
        try:
            self._model(frames)
        finally:
            handle.remove()
        return kept[0][0].float().flatten().numpy()

    def distance(self, reference: Frames, candidate: Frames) -> float:
        """One less the cosine of the two clips' features: 0 for equal clips, at most 2."""
        a, b = self(reference).astype(np.float64), self(candidate).astype(np.float64)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        if norms == 0:
            return float(not np.array_equal(a, b))
        return max(0.0, 1 - float(a @ b) / norms)

    def _input(self, clip: Frames) -> torch.Tensor:
        """One batch of the recogniser, sampled, resized and cropped as it takes clips."""
        spec = self._spec
        if clip.ndim != 4 or clip.shape[-1] not in (1, 3):
            message = f"features are read off frames [T, H, W, 1 or 3], got {clip.shape}"
            raise InputError(message)
        chosen = clip[list(centered_indices(len(clip), spec.num_frames, spec.stride))]
        height, width = resized_size(clip.shape[1], clip.shape[2], spec)
        pixels = functional.interpolate(
            torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2))).float(),
            (height, width), mode="bilinear", antialias=True,
        )  # fmt: skip
        top, left = crop_origin(height, width, spec)
        cropped = pixels[..., top : top + spec.height, left : left + spec.width]
        bytes_ = (cropped.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        if spec.channels == 1 and bytes_.shape[-1] == 3:
            bytes_ = gray_from_rgb(bytes_)
        elif spec.channels == 3 and bytes_.shape[-1] == 1:
            bytes_ = np.repeat(bytes_, 3, axis=-1)
        return torch.from_numpy(to_model_input(np.ascontiguousarray(bytes_), spec))[None]
