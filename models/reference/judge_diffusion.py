"""Judge the reference video diffusion transformer, in numbers and in pictures.

    python -m vcompress.models.reference.judge_diffusion --data FOLDER --out FOLDER

writes sheets of frames, and the numbers to the description beside the weights.
Measured, on prompts and seeds of `held_out_prompts` and on garments that training never saw:
- Garment: share of generated clips whose last frame a classifier of real garments, trained here in
  half a minute, gives the class that was asked for; beside it the same on real clips.
- Motion: distance in pixels between the centre of light and where it should be, had the garment
  moved as asked from where it is in the first frame; mean over frames and clips. Beside it that of
  real clips (their rendering is exact: 0) and that of a garment that stays where it is.
- Continuation: PSNR of the generated frames given the first 4, against copying the last of them.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import nn
from torch.nn import functional

from vcompress.models.reference import bouncing_garments, moving_fashion, sources
from vcompress.models.reference.bouncing_garments import Prompt
from vcompress.models.reference.diffusion_sampler import (
    GUIDANCE_SCALE,
    continue_clips,
    generate,
    load_pipeline,
)

__all__ = ["continuation_psnr", "garment_accuracy", "held_out_prompts", "motion_error", "sheet"]

TEST_SEED = 10_000
_KNOWN_FRAMES = 4
_DARK = 24  # of 255: below it a pixel is background, also where the model leaves a little noise


def held_out_prompts(count: int = 32) -> list[Prompt]:
    """The first `count` of all 160 prompts in a fixed order, no garment twice in a row."""
    order = np.random.RandomState(3).permutation(16)
    prompts = [
        Prompt(
            garment=garment,
            direction=bouncing_garments.DIRECTIONS[(order[turn] + number) % 8],
            speed=bouncing_garments.SPEEDS[(order[turn] // 8 + number) % 2],
        )
        for turn in range(16)
        for number, garment in enumerate(bouncing_garments.GARMENTS)
    ]
    return prompts[:count]


class GarmentClassifier(nn.Sequential):
    """Frames `[N, 1, 48, 48]` in 0..1 to logits `[N, 10]`; a small convolutional network."""

    def __init__(self) -> None:
        widths = (1, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
                nn.MaxPool2d(2),
            ]  # fmt: skip
        super().__init__(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(1152, 10))


def train_classifier(garments: moving_fashion.Garments, steps: int = 400) -> GarmentClassifier:
    """Train on single frames of real clips."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    model = GarmentClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        clips, labels, _ = bouncing_garments.draw(garments, 128, generator)
        # A little noise: generated frames are not exactly black where the field is black.
        frames = clips[:, -1:].float() / 255
        frames += 0.03 * torch.randn(frames.shape, generator=generator)
        loss = functional.cross_entropy(model(frames), labels[:, 0])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        rates.step()
    return model.eval()


@torch.no_grad()
def garment_accuracy(
    classifier: GarmentClassifier, clips: npt.NDArray[np.uint8], kinds: npt.NDArray[np.int64]
) -> float:
    """Percent of clips `[N, T, H, W]` whose last frame shows the garment `kinds` `[N]`."""
    frames = torch.from_numpy(clips[:, -1:]).float() / 255
    guess = classifier(frames).argmax(-1).numpy()
    return 100 * float((guess == kinds).mean())


def _centres(clips: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Centres of light `[N, T, 2]` (y, x) of clips `[N, T, H, W]`."""
    light = np.where(clips < _DARK, 0, clips).astype(np.float64)
    total = np.maximum(light.sum((-1, -2)), 1e-9)
    field = np.arange(clips.shape[-1])
    return np.stack(
        [(light.sum(-1) * field).sum(-1) / total, (light.sum(-2) * field).sum(-1) / total], -1
    )


def motion_error(clips: npt.NDArray[np.uint8], labels: torch.Tensor) -> tuple[float, float]:
    """Pixels between asked and shown path of clips `[N, T, H, W]`, and that of standing still.

    Where in its 28x28 box a garment lies is unknown for a generated clip, so the start that suits
    the shown path best is taken, among all that the field has room for.
    """
    centres = _centres(clips)
    room = bouncing_garments.SIZE - bouncing_garments.GARMENT_SIZE
    starts = torch.cartesian_prod(torch.arange(room + 1), torch.arange(room + 1))
    shown, still = [], []
    for centre, label in zip(centres, labels, strict=True):
        asked = bouncing_garments.path(starts, label.expand(len(starts), -1)).double().numpy()
        # Compare shapes of paths: the offset of the centre in the box is a constant.
        moved = asked - asked.mean(1, keepdims=True)
        error = np.linalg.norm(moved - (centre - centre.mean(0)), axis=-1).mean(-1)
        best = int(error.argmin())
        shown.append(error[best])
        still.append(np.linalg.norm(moved[best], axis=-1).mean())
    return float(np.mean(shown)), float(np.mean(still))


def continuation_psnr(
    pipe: WanPipeline, clips: npt.NDArray[np.uint8], *, seed: int
) -> dict[str, float]:
    """PSNR in dB of continuations of clips `[N, T, H, W]` from 4 frames, and of copying.

    Of all generated frames, and of the fourth alone; mean square errors are averaged over clips.
    """
    generated = continue_clips(pipe, clips[:, :_KNOWN_FRAMES], seed=seed)
    copied = np.broadcast_to(clips[:, _KNOWN_FRAMES - 1 : _KNOWN_FRAMES], clips.shape)
    fourth = slice(2 * _KNOWN_FRAMES - 1, 2 * _KNOWN_FRAMES)
    rest = slice(_KNOWN_FRAMES, None)
    return {
        "all": _psnr(generated[:, rest], clips[:, rest]),
        "all_copied": _psnr(copied[:, rest], clips[:, rest]),
        "four_ahead": _psnr(generated[:, fourth], clips[:, fourth]),
        "four_ahead_copied": _psnr(copied[:, fourth], clips[:, fourth]),
    }


def _psnr(ours: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8]) -> float:
    error = np.square(ours.astype(np.float64) - truth).mean()
    return float(10 * np.log10(255**2 / error))


def sheet(clips: npt.NDArray[np.uint8], *, every: int = 2, scale: int = 2) -> npt.NDArray[np.uint8]:
    """A picture `[H', W']` of clips `[N, T, H, W]`: a row each, every second frame, enlarged."""
    frames = clips[:, ::every]
    framed = np.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=90)
    rows = framed.transpose(0, 2, 1, 3).reshape(framed.shape[0] * framed.shape[2], -1)
    return np.kron(rows, np.ones((scale, scale), np.uint8))


def judge(
    pipe: WanPipeline, classifier: GarmentClassifier, *, count: int, guidance_scale: float
) -> tuple[dict[str, float], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The numbers, the generated clips `[count, T, H, W]`, and real and continued ones in turn."""
    prompts = held_out_prompts(count)
    labels = torch.tensor([prompt.label for prompt in prompts])
    clips = generate(pipe, prompts, seed=TEST_SEED, guidance_scale=guidance_scale)
    shown, still = motion_error(clips, labels)
    generator = torch.Generator().manual_seed(TEST_SEED)
    unseen = moving_fashion.split("test")
    real, real_labels, _ = bouncing_garments.draw(unseen, count, generator)
    psnr = continuation_psnr(pipe, real.numpy(), seed=TEST_SEED)
    kinds = (labels[:, 0].numpy(), real_labels[:, 0].numpy())
    numbers = {
        "clips": count,
        "guidance_scale": guidance_scale,
        "garment_accuracy_percent": garment_accuracy(classifier, clips, kinds[0]),
        "garment_accuracy_of_real_clips_percent": garment_accuracy(
            classifier, real.numpy(), kinds[1]
        ),
        "motion_error_px": shown,
        "motion_error_of_standing_still_px": still,
        **{f"continuation_psnr_{key}_db": value for key, value in psnr.items()},
    }
    few = real.numpy()[:8]
    continued = continue_clips(pipe, few[:, :_KNOWN_FRAMES], seed=TEST_SEED)
    pairs = np.stack([few, continued], 1).reshape(-1, *few.shape[1:])
    rounded = {key: round(value, 3) for key, value in numbers.items()}
    return rounded, clips, pairs


def main() -> None:
    """Parse the command line, judge, write pictures and numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures")
    parser.add_argument("--weights", type=Path, help="folder that was exported to; else what ships")
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    arguments = parser.parse_args()
    folder = arguments.weights or Path(__file__).parent / "assets"
    classifier = train_classifier(sources.fashion_mnist(arguments.data, "train"))
    numbers, clips, pairs = judge(
        load_pipeline(folder),
        classifier,
        count=arguments.clips,
        guidance_scale=arguments.guidance_scale,
    )
    print(json.dumps(numbers, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet(clips[:20])).save(arguments.out / "generated.png")
    Image.fromarray(sheet(pairs)).save(arguments.out / "continued.png")
    description = folder / "bouncing_garments.json"
    facts = json.loads(description.read_text())
    description.write_text(json.dumps({**facts, "measured": numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
