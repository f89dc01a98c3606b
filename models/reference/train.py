"""Train the reference recognisers: `python -m vcompress.models.reference.train penvideo20`.

On two cores without other load PenVideo-20 takes about 7 minutes and Moving Fashion about 45. Under
glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 halves that: without them every step
gives its buffers back to the kernel and takes them again.

Both are transformers' VideoMAE classifier, trained from random weights with a cosine schedule and
label smoothing, in bfloat16 autocast. The weights are an average over the last steps (exponential
moving average).

Moving Fashion is hard for a transformer without any prior on images, so it gets six aids, none
of which the trained model needs:
- Garments first move in jumps from cell to cell of the patch grid, and come loose little by little.
  A garment then looks the same in every cell; this alone took recognition after 300 steps from
  38 % to 61 %.
- Muon (Jordan et al., 2024) in place of AdamW for the matrices of the blocks.
- Tokens are labelled, too: the garment that they show, or none (token labelling, Jiang et al.,
  2021, arXiv:2104.10858, with the labels that we know in place of another model's).
- Most tokens are dropped at first and come back stage by stage (PatchDropout, Liu et al., 2022,
  arXiv:2208.07220, with VideoMAE's own mask; here the garment's are kept). A fifth of the
  garment's tokens tell what it is, and cost a fifth: many garments are seen early.
- Training starts on black and fades the real backgrounds in, clip by clip (a curriculum).
  Backgrounds are many and varied (see `fashion_clips`).
- The class is a pair, garment and direction; the loss judges each alone as well as the pair.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from vcompress.models.reference import moving_fashion, penvideo, sources
from vcompress.models.reference.fashion_clips import FashionClips, Range, TrainingClips
from vcompress.models.reference.recipes import CONFIGS, RECIPES, Stage

_EMA_DECAY = 0.998
_REPORT_STEPS = 100
_ASSETS = Path(__file__).parent / "assets"

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
        gains, freedoms = _between(*stage.gains, done), _between(*stage.freedoms, done)
        return clips.draw(stage.batch_size, gains, freedoms, CONFIGS["moving_fashion"])

    return draw


def _between(first: Range, last: Range, done: float) -> Range:
    low, high = (a + done * (b - a) for a, b in zip(first, last, strict=True))
    return low, high


def normalise(clips: npt.NDArray[np.uint8], mean: float, std: float) -> torch.Tensor:
    """Clips `[N, T, H, W, C]` uint8 as VideoMAE input `[N, T, C, H, W]` float32."""
    pixels = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float().div_(255)
    return pixels.sub_(mean).div_(std)


def _seen_tokens(num_tokens: int, stage: Stage, batch: TrainingClips) -> torch.Tensor:
    """Which tokens `[N, tokens]` the model sees."""
    rank = torch.rand(len(batch.labels), num_tokens)
    if batch.objects is not None:
        rank -= stage.prefer_objects * torch.from_numpy(batch.objects).float()
    return rank.argsort(1).argsort(1) < int(num_tokens * stage.keep_tokens)


def _token_loss(
    logits: torch.Tensor, objects: npt.NDArray[np.bool_], kinds: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of what each seen token shows: logits `[N, seen tokens, kinds + 1]`."""
    nothing = logits.shape[-1] - 1
    shown = torch.where(torch.from_numpy(objects), kinds[:, None], nothing)
    return functional.cross_entropy(logits.flatten(0, 1), shown[seen])


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
        # What a token shows; for training only.
        self.reader = nn.Linear(CONFIGS[name]["hidden_size"], self.recipe.factors[0] + 1)
        self.optimisers = self._optimisers()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        rate = self.recipe.matrix_rate
        matrices = [
            p for name, p in self.model.named_parameters()
            if rate is not None and p.ndim == 2 and ".encoder." in name
        ]  # fmt: skip
        taken = {id(p) for p in matrices}
        left = [
            p for p in (*self.model.parameters(), *self.reader.parameters()) if id(p) not in taken
        ]
        decay, rest = [p for p in left if p.ndim > 1], [p for p in left if p.ndim <= 1]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
                lr=self.recipe.learning_rate,
            )
        ]
        if rate is not None:
            found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.01))
        for optimiser in found:
            for group in optimiser.param_groups:
                group["highest"] = group["lr"]
        return found

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
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["highest"] * recipe.rate(self.step)
            optimiser.zero_grad()
        loss = self._batch_loss(draw(stage, done), stage)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return float(loss.detach())

    def _batch_loss(self, batch: TrainingClips, stage: Stage) -> torch.Tensor:
        recipe, model = self.recipe, self.model
        seen = _seen_tokens(model.videomae.embeddings.num_patches, stage, batch)
        labels = torch.from_numpy(batch.labels)
        with torch.autocast("cpu", torch.bfloat16):
            pixels = normalise(batch.clips, recipe.mean, recipe.std)
            hidden = model.videomae(pixels, bool_masked_pos=~seen).last_hidden_state
            assert model.fc_norm is not None
            logits = model.classifier(model.fc_norm(hidden.mean(1)))
            shown = self.reader(hidden)
        loss = _loss(logits.float(), labels, recipe.factors)
        if batch.objects is not None:
            kinds = labels // math.prod(recipe.factors[1:])
            loss = loss + _token_loss(shown.float(), batch.objects, kinds, seen)
        return loss

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "reader": self.reader.state_dict(), "step": self.step,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }  # fmt: skip

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.reader.load_state_dict(state["reader"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
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
