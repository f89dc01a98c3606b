"""Train the reference recognisers: `python -m vcompress.models.reference.train penvideo20`.

On two cores without other load PenVideo-20 takes about 7 minutes and Moving Fashion about 40. Under
glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 halves that: without them every step
gives its buffers back to the kernel and takes them again.

Both are transformers' VideoMAE classifier, trained from random weights with AdamW, a cosine
schedule and label smoothing, in bfloat16 autocast. The weights are an average over the last steps
(exponential moving average).

Moving Fashion is hard for a transformer without any prior on images, so it gets four aids, none
of which the trained model needs:
- Most tokens are dropped at first and come back stage by stage (PatchDropout, Liu et al., 2022,
  arXiv:2208.07220, with VideoMAE's own mask; here the garment's are kept). A fifth of the
  garment's tokens tell what it is, and cost a fifth: many garments are seen early.
- Training starts on black and fades the real backgrounds in, clip by clip (a curriculum).
- Backgrounds are many and varied (see `fashion_clips`).
- The class is a pair, garment and direction; the loss judges each alone as well as the pair.
Without them direction is learnt in thousands of steps and the garment not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from vcompress.models.reference import moving_fashion, penvideo, sources
from vcompress.models.reference.fashion_clips import FashionClips, TrainingClips

CONFIGS: dict[str, dict[str, Any]] = {
    "penvideo20": {
        "image_size": 32, "patch_size": 8, "num_channels": 1, "num_frames": 16, "tubelet_size": 2,
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "num_labels": 20,
    },
    "moving_fashion": {
        "image_size": 64, "patch_size": 8, "num_channels": 3, "num_frames": 16, "tubelet_size": 4,
        "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 1024, "num_labels": 80,
    },
}  # fmt: skip
_WARM_UP_STEPS = 200
_EMA_DECAY = 0.998
_REPORT_STEPS = 100
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training.

    Attributes:
        steps, batch_size: of the stage.
        keep_tokens: share of a clip's tokens that the model sees.
        darkest, brightest: factors between which a clip's background is dimmed, at the stage's
            first and last step.
    """

    steps: int
    batch_size: int
    keep_tokens: float = 1.0
    darkest: tuple[float, float] = (1.0, 1.0)
    brightest: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one task is trained.

    Attributes:
        mean, std: of the input, as in the shipped model's clip specification.
        learning_rate: the highest.
        decay_from: share of training after which the rate falls, as a cosine.
        stages: in their order.
        factors: sizes of the parts of a class; their product is the number of classes.
    """

    mean: float
    std: float
    learning_rate: float
    decay_from: float
    stages: tuple[Stage, ...]
    factors: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of `step`, and which share of it is done."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step / stage.steps
            step -= stage.steps
        return self.stages[-1], 1.0

    def rate(self, step: int) -> float:
        """The learning rate of `step`."""
        progress = step / self.steps
        falling = max(0.0, (progress - self.decay_from) / (1 - self.decay_from))
        warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
        return self.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * falling)) + 0.005)


RECIPES: dict[str, Recipe] = {
    # Nearly all pixels are 0: with std 0.1 the pen is not drowned by the position embedding.
    # Dropping tokens would drop the pen tip, so all are kept.
    "penvideo20": Recipe(
        mean=0.0, std=0.1, learning_rate=1e-3, decay_from=0.0, factors=(20,),
        stages=(Stage(steps=1500, batch_size=64),),
    ),
    "moving_fashion": Recipe(
        mean=0.5, std=0.25, learning_rate=1e-3, decay_from=0.6, factors=(10, 8),
        stages=(
            Stage(steps=2_500, batch_size=96, keep_tokens=0.1, darkest=(0, 0), brightest=(0, 0.7)),
            Stage(
                steps=2_800, batch_size=32, keep_tokens=0.3125, darkest=(0, 1), brightest=(0.7, 1)
            ),
            Stage(steps=1_300, batch_size=32),
        ),
    ),
}  # fmt: skip


# From a stage and the share of it that is done.
Draw = Callable[[Stage, float], TrainingClips]


def _penvideo_batches() -> Draw:
    movements, labels = penvideo.split("train")
    generator = np.random.default_rng(1)

    def draw(stage: Stage, _done: float) -> TrainingClips:
        batch_size = stage.batch_size
        index = generator.integers(len(labels), size=batch_size)
        # A shift and a scale of the whole movement: handwriting varies so between people.
        scale = generator.uniform(0.85, 1.0, (batch_size, 1, 1))
        shift = generator.uniform(0, 100 * (1 - scale), (batch_size, 1, 2))
        moved = np.rint(movements[index] * scale + shift).astype(np.uint8)
        return TrainingClips(penvideo.render(moved), labels[index])

    return draw


def _fashion_batches(root: Path) -> Draw:
    clips = FashionClips(root, seed=1)

    def draw(stage: Stage, done: float) -> TrainingClips:
        darkest, brightest = (
            first + done * (last - first) for first, last in (stage.darkest, stage.brightest)
        )
        return clips.draw(stage.batch_size, darkest, brightest, CONFIGS["moving_fashion"])

    return draw


def normalise(clips: npt.NDArray[np.uint8], mean: float, std: float) -> torch.Tensor:
    """Clips `[N, T, H, W, C]` uint8 as VideoMAE input `[N, T, C, H, W]` float32."""
    pixels = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float().div_(255)
    return pixels.sub_(mean).div_(std)


def _dropped_logits(
    model: VideoMAEForVideoClassification, pixels: torch.Tensor, keep: float,
    objects: npt.NDArray[np.bool_] | None,
) -> torch.Tensor:  # fmt: skip
    """Logits from a share `keep` of the tokens of each clip: `objects` first, others at random."""
    num_tokens = model.videomae.embeddings.num_patches
    rank = torch.rand(len(pixels), num_tokens)
    if objects is not None:
        rank -= torch.from_numpy(objects).float()
    masked = rank.argsort(1).argsort(1) >= int(num_tokens * keep)
    hidden = model.videomae(pixels, bool_masked_pos=masked).last_hidden_state
    assert model.fc_norm is not None
    logits: torch.Tensor = model.classifier(model.fc_norm(hidden.mean(1)))
    return logits


def _loss(logits: torch.Tensor, labels: torch.Tensor, factors: tuple[int, ...]) -> torch.Tensor:
    """Cross entropy of the classes `[N, prod(factors)]` and, with several factors, of each."""
    loss = functional.cross_entropy(logits, labels, label_smoothing=0.05)
    if len(factors) == 1:
        return loss
    grid = logits.log_softmax(-1).view(-1, *factors)
    for axis, part in enumerate(torch.unravel_index(labels, factors), start=1):
        others = [other for other in range(1, grid.ndim) if other != axis]
        loss = loss + functional.nll_loss(grid.logsumexp(others), part)
    return loss


class Trainer:
    """Model, average, optimiser and step count; can be stopped and resumed from a checkpoint."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.recipe, self.step = name, RECIPES[name], 0
        self.model = VideoMAEForVideoClassification(VideoMAEConfig(**CONFIGS[name]))
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(_EMA_DECAY),  # type: ignore[no-untyped-call]
        )
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        )

    def run(self, draw: Draw, checkpoint: Path | None) -> None:
        """Train to the end of the recipe, resuming from `checkpoint` where it exists."""
        if checkpoint is not None and checkpoint.exists():
            self._restore(torch.load(checkpoint, weights_only=True))
        started, first, losses = time.monotonic(), self.step, []
        while self.step < self.recipe.steps:
            losses.append(self._step(draw))
            if self.step % _REPORT_STEPS == 0:
                pace = (time.monotonic() - started) / (self.step - first)
                print(f"step {self.step}  {pace:.2f} s  loss {np.mean(losses):.3f}", flush=True)
                losses.clear()
                if checkpoint is not None:
                    temporary = checkpoint.with_suffix(".tmp")
                    torch.save(self._state(), temporary)
                    temporary.replace(checkpoint)

    def _step(self, draw: Draw) -> float:
        recipe = self.recipe
        stage, done = recipe.at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.rate(self.step)
        batch = draw(stage, done)
        with torch.autocast("cpu", torch.bfloat16):
            pixels = normalise(batch.clips, recipe.mean, recipe.std)
            logits = _dropped_logits(self.model, pixels, stage.keep_tokens, batch.objects)
        loss = _loss(logits.float(), torch.from_numpy(batch.labels), recipe.factors)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return float(loss.detach())

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(), "step": self.step,
        }  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    @property
    def result(self) -> VideoMAEForVideoClassification:
        """The averaged model."""
        return cast("VideoMAEForVideoClassification", self.average.module.eval())


def save(model: VideoMAEForVideoClassification, name: str) -> None:
    """Write float16 weights and the configuration that the shipped model is loaded from."""
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, _ASSETS / f"{name}.safetensors")
    text = json.dumps(CONFIGS[name], indent=2)
    (_ASSETS / f"{name}.json").write_text(text + "\n")


@torch.inference_mode()
def accuracy(
    model: VideoMAEForVideoClassification, clips: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64], *, mean: float, std: float,
) -> float:  # fmt: skip
    """Top-1 accuracy in percent, float32."""
    hits = 0
    for first in range(0, len(labels), 100):
        pixels = normalise(clips[first : first + 100], mean, std)
        guess = model(pixels).logits.argmax(-1).numpy()
        hits += int((guess == labels[first : first + 100]).sum())
    return 100 * hits / len(labels)


def main() -> None:
    """Parse the command line, make the data assets where asked, train, save and score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=[*CONFIGS, "assets"])
    parser.add_argument("--data", type=Path, help="folder that holds the unpacked packages")
    parser.add_argument("--checkpoint", type=Path, help="written often; resumed from if there")
    arguments = parser.parse_args()
    if arguments.task == "assets":
        sources.write_assets(arguments.data)
        return
    recipe = RECIPES[arguments.task]
    if arguments.task == "penvideo20":
        draw = _penvideo_batches()
        movements, labels = penvideo.split("test")
        clips = penvideo.render(movements)
    else:
        draw = _fashion_batches(arguments.data)
        clips, labels = moving_fashion.compose(
            moving_fashion.split("test"), moving_fashion.shipped_backgrounds("test"), seed=1
        )
    trainer = Trainer(arguments.task)
    trainer.run(draw, arguments.checkpoint)
    save(trainer.result, arguments.task)
    top1 = accuracy(trainer.result, clips, labels, mean=recipe.mean, std=recipe.std)
    print(f"top-1 {top1:.2f} % of {len(labels)} clips")


if __name__ == "__main__":
    main()
