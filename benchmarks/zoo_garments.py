"""The shipped video diffusion transformer with calls of its pipeline, and clips that it generates.

Calls are recorded over whole generations with classifier-free guidance, of other prompts and seeds
for calibration than for the test. What is compared in the end are generated clips: those of the
candidate with those of the uncompressed transformer, from the same noise.

Shapes: N clips, T frames, H W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from vcompress.calib.calls import Calls, load_calls
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.recording import record_calls
from vcompress.models.reference.bouncing_garments import DIRECTIONS, GARMENTS, SPEEDS
from vcompress.models.reference.diffusion_sampler import generate, reference_pipeline
from vcompress.models.video import VideoModel

__all__ = ["NUM_STEPS", "Part", "load_parts", "prompts_of"]

Part = Literal["calibration", "test"]

NUM_STEPS = 10
_PROMPTS: dict[Part, int] = {"calibration": 8, "test": 6}
_SEEDS: dict[Part, int] = {"calibration": 1000, "test": 5000}


def prompts_of(part: Part) -> list[str]:
    """The prompts of a part: the same words as those of the other, in other combinations."""
    offset = 0 if part == "calibration" else 3
    return [
        ", ".join((
            GARMENTS[(3 * number) % len(GARMENTS)],
            DIRECTIONS[(number + offset) % len(DIRECTIONS)],
            SPEEDS[(number + offset) % len(SPEEDS)],
        ))
        for number in range(_PROMPTS[part])
    ]  # fmt: skip


def _recorded(pipe: Any, part: Part, count: int) -> Calls:
    """`count` calls, spread over the steps of all generations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls.pt"
        with record_calls(pipe.transformer, path):
            for number, prompt in enumerate(prompts_of(part)):
                generate(pipe, [prompt], seed=_SEEDS[part] + number, num_steps=NUM_STEPS)
        return load_calls(path).spread(count)


def load_parts(
    num_calibration: int, num_test: int
) -> tuple[VideoModel, Calls, Calls, Callable[[VideoModel], torch.Tensor]]:
    """The transformer, calls to calibrate and to test, and a model -> generated clips function.

    Clips are `[N, 1, T, H, W]` in 0..1. They come from the test's prompts, and noise of other seeds
    than the calls.
    """
    pipe = reference_pipeline("bouncing-garments")
    calibration = _recorded(pipe, "calibration", num_calibration)
    test = _recorded(pipe, "test", num_test)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls.pt"
        with record_calls(pipe.transformer, path):
            generate(pipe, prompts_of("test")[:1], seed=0, num_steps=2)
        options = LoadOptions(calls=path)
        model = wrap_module(
            pipe.transformer, name="bouncing-garments", options=options,
            family=type(pipe.transformer).__name__,
        )  # fmt: skip
    prompts = prompts_of("test")

    def run(candidate: VideoModel) -> torch.Tensor:
        kept = pipe.transformer
        pipe.transformer = candidate.module
        try:
            clips = generate(pipe, prompts, seed=_SEEDS["test"] + 100, num_steps=NUM_STEPS)
        finally:
            pipe.transformer = kept
        return torch.from_numpy(clips)[:, None].float() / 255

    return model, calibration, test, run
