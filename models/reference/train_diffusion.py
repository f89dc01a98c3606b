"""Train the reference video diffusion transformer on Bouncing Garments.

    python -m vcompress.models.reference.train_diffusion --data FOLDER --checkpoint dit.ckpt
    python -m vcompress.models.reference.train_diffusion --data FOLDER --checkpoint dit.ckpt \
        --decay-steps 1000 --export

The model is diffusers' `WanTransformer3DModel` on pixels, trained from random weights by flow
matching (Lipman et al., 2023, arXiv:2210.02747): it sees (1 - s) * clip + s * noise. It predicts
the clip, and its loss is the error of the velocity that follows, (noisy - clip) / s, as Li and He
("Back to Basics: Let Denoising Generative Models Denoise", 2025, arXiv:2511.13720) do for large
patches of pixels: noise fills all 256 values of a patch, and a width of 256 that must carry it has
no room for anything else. A velocity was tried: 1,700 steps brought it less far than 200 of this.
Every fourth step is a continuation, as in Wan 2.2 TI2V: the first frames are clean and their tokens
carry time step 0, so that one model does both.

How it is made to learn on one core:
- Weight matrices of the blocks are optimised by Muon (Jordan et al., 2024,
  https://kellerjordan.github.io/posts/muon/), all else by AdamW; bfloat16 autocast.
- Blocks start as the identity (adaLN-Zero of DiT, Peebles and Xie, 2023, arXiv:2212.09748), and
  the output as what most pixels are: dark.
- Constant learning rate with an average of the weights (exponential moving average); training can
  go on for as long as there is time. `--decay-steps` then lets the rate fall to zero over so many
  steps, in a checkpoint of its own, from which `--export` writes the assets.

A run that is stopped goes on from its checkpoint with the same numbers, bit for bit (with
`--compile` or without, as before). Under glibc, MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=100000000000 makes it faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vcompress.models.reference import bouncing_garments, sources
from vcompress.models.reference.bouncing_garments import NUM_FRAMES, SIZE
from vcompress.models.reference.diffusion_sampler import to_latents
from vcompress.models.reference.moving_fashion import Garments

__all__ = ["CONFIG", "Trainer", "export"]

CONFIG: dict[str, Any] = {
    "patch_size": [4, 8, 8], "num_attention_heads": 4, "attention_head_dim": 64,
    "in_channels": 1, "out_channels": 1, "text_dim": bouncing_garments.TOKEN_WIDTH,
    "freq_dim": 256, "ffn_dim": 1024, "num_layers": 8, "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}  # fmt: skip
BATCH_SIZE = 32
# Of Muon and of AdamW. Muon's is scaled to the size of AdamW's updates (`match_rms_adamw`).
LEARNING_RATES = (2e-3, 1e-3)
_WARM_UP_STEPS = 100
_EMA_DECAY = 0.999
_DROPPED_PROMPTS = 0.1
# A known beginning mostly says what a prompt would, and users have frames rather than prompts.
_DROPPED_PROMPTS_CONTINUING = 0.5
# Noise levels: a logistic normal, shifted towards noise because 16 frames show one object.
_LEVEL_SPREAD = 1.2
_LEVEL_SHIFT = 2.0
# The error of the velocity is that of the clip over the level; below this it is mostly rounding.
_LEAST_LEVEL = 0.1
_STEPS_A_CONTINUATION = 4
_DARK = -0.8
_REPORT_SECONDS = 120.0
_ASSETS = Path(__file__).parent / "assets"


def new_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A `WanTransformer3DModel` (it has no types): blocks are the identity, all frames dark."""
    torch.manual_seed(seed)
    model: Any = WanTransformer3DModel(**config)
    with torch.no_grad():
        for block in model.blocks:
            nn.init.zeros_(block.scale_shift_table)
            nn.init.zeros_(block.attn2.to_out[0].weight)
            nn.init.zeros_(block.attn2.to_out[0].bias)
        nn.init.zeros_(model.condition_embedder.time_proj.weight)
        nn.init.zeros_(model.condition_embedder.time_proj.bias)
        nn.init.zeros_(model.scale_shift_table)
        nn.init.zeros_(model.patch_embedding.bias)
        nn.init.orthogonal_(model.patch_embedding.weight.flatten(1))
        nn.init.zeros_(model.proj_out.weight)
        nn.init.constant_(model.proj_out.bias, _DARK)
    return model


class _FasterOnCores(TorchFunctionMode):
    """Exchanges two operations for ones that are faster on a CPU in bfloat16, the backward too.

    Fused attention is made for long sequences: written out, 144 tokens take a third of its time,
    3 prompt tokens a tenth. A root mean square norm is fused where its weight has the input's type.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        named = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            query, key, value = args or (named[name] for name in ("query", "key", "value"))
            weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            return weights.softmax(-1).type_as(value) @ value
        if func is functional.rms_norm:
            named["weight"] = named["weight"].type_as(args[0])
        return func(*args, **named)


class Trainer:
    """Model, average, optimisers, generator and step count; can be stopped at any step."""

    def __init__(
        self,
        garments: Garments,
        config: dict[str, Any],
        *,
        batch_size: int = BATCH_SIZE,
        compiled: bool = False,
    ) -> None:
        self.garments, self.batch_size, self.step = garments, batch_size, 0
        self.decay_from: int | None = None
        self.earlier_steps = 0  # of the run that it started from
        self.model = new_model(config)
        self.average: Any = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.generator = torch.Generator().manual_seed(1)
        hidden = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        seen = {id(parameter) for parameter in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in seen]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                hidden, lr=LEARNING_RATES[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=LEARNING_RATES[1], betas=(0.9, 0.98), weight_decay=0.0),
        )

    def run(
        self, until: int, checkpoint: Path | None = None, *, decay_steps: int = 0
    ) -> list[float]:
        """Train to step `until`, or to the end of the decay, and give the losses of this run."""
        if decay_steps:
            if self.decay_from is None:
                self.decay_from = self.step
            until = self.decay_from + decay_steps
        losses: list[float] = []
        started = reported = time.monotonic()
        reported_losses = 0
        while self.step < until:
            losses.append(self._one_step(self._share_of_rate(decay_steps)))
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS or self.step == until:
                recent = losses[reported_losses:]
                print(
                    f"step {self.step}  {(now - started) / len(losses):.2f} s  "
                    f"loss {sum(recent) / len(recent):.4f}",
                    flush=True,
                )
                reported, reported_losses = now, len(losses)
                if checkpoint is not None:
                    temporary = checkpoint.with_suffix(".tmp")
                    torch.save(self.state(), temporary)
                    temporary.replace(checkpoint)
        return losses

    def _share_of_rate(self, decay_steps: int) -> float:
        warm = min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        if self.decay_from is None:
            return warm
        return warm * (1 - (self.step - self.decay_from) / decay_steps)

    def _one_step(self, share: float) -> float:
        for optimiser, rate in zip(self.optimisers, LEARNING_RATES, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = share * rate
        loss = self._loss(continuing=self.step % _STEPS_A_CONTINUATION == 1)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        # Early on the average is short, so that it forgets the random weights.
        decay = min(_EMA_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        return float(loss.detach())

    def _loss(self, *, continuing: bool) -> torch.Tensor:
        """Squared error of the velocity, of the unknown frames alone where some are known.

        Velocities are noisy - clip over the level, so their error is that of the clip over it.
        """
        count, generator = self.batch_size, self.generator
        pixels, labels, _ = bouncing_garments.draw(self.garments, count, generator)
        clips = to_latents(pixels)
        normal = torch.randn(count, generator=generator)
        level = torch.sigmoid(_LEVEL_SPREAD * normal)
        level = _LEVEL_SHIFT * level / (1 + (_LEVEL_SHIFT - 1) * level)
        noise = torch.randn(clips.shape, generator=generator)
        chance = _DROPPED_PROMPTS_CONTINUING if continuing else _DROPPED_PROMPTS
        dropped = torch.rand(count, generator=generator) < chance
        noisy = torch.lerp(clips, noise, level.view(-1, 1, 1, 1, 1))
        known, timestep = 0, 1000 * level
        if continuing:
            patch = self.model.config.patch_size
            known = patch[0]
            noisy[:, :, :known] = clips[:, :, :known]
            free = torch.ones(NUM_FRAMES // patch[0], (SIZE // patch[1]) * (SIZE // patch[2]))
            free[0] = 0
            timestep = timestep[:, None] * free.flatten()
        with _FasterOnCores(), torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(
                noisy, timestep, bouncing_garments.embed(labels, dropped), return_dict=False
            )[0]
        error = (predicted.float() - clips)[:, :, known:]
        error = error / level.clamp(min=_LEAST_LEVEL).view(-1, 1, 1, 1, 1)
        return cast("torch.Tensor", error.square().mean())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "earlier_steps": self.earlier_steps,
            "decay_from": self.decay_from,
        }

    def start_from(self, state: dict[str, Any]) -> None:
        """Take the averaged weights of the run that `state` is of; the output starts anew."""
        weights = {key: value for key, value in state["average"].items() if "proj_out" not in key}
        for model in (self.model, self.average):
            model.load_state_dict(weights, strict=False)
        self.earlier_steps = state["step"] + state.get("earlier_steps", 0)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, stored in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        self.generator.set_state(state["generator"])
        self.step, self.decay_from = state["step"], state["decay_from"]
        self.earlier_steps = state["earlier_steps"]


def export(trainer: Trainer, folder: Path) -> None:
    """Write the averaged weights as float16, and what was trained how."""
    tensors = {
        key: value.half().contiguous() for key, value in trainer.average.state_dict().items()
    }
    save_file(tensors, folder / "bouncing_garments.safetensors")
    facts = {
        "transformer": {key: value for key, value in trainer.model.config.items() if key in CONFIG},
        "training": {
            "steps": trainer.step,
            "steps_of_the_run_it_started_from": trainer.earlier_steps,
            "clips": trainer.step * trainer.batch_size,
            "decay_steps": 0 if trainer.decay_from is None else trainer.step - trainer.decay_from,
            "batch_size": trainer.batch_size,
            "learning_rates": LEARNING_RATES,
            "average": _EMA_DECAY,
            "data": "Fashion-MNIST, official training part, 60,000 garments",
        },
    }
    (folder / "bouncing_garments.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    """Parse the command line, train, let the rate decay where asked, export where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST")
    parser.add_argument("--checkpoint", type=Path, required=True, help="resumed from if there")
    parser.add_argument("--steps", type=int, default=100_000, help="train to this step")
    parser.add_argument("--decay-steps", type=int, default=0, help="then let the rate fall to 0")
    parser.add_argument("--start-from", type=Path, help="checkpoint of another run")
    parser.add_argument("--compile", action="store_true", help="faster steps; needs a C++ compiler")
    parser.add_argument("--export", action="store_true", help="write the assets and end")
    parser.add_argument("--out", type=Path, default=_ASSETS, help="folder for --export")
    arguments = parser.parse_args()
    garments = sources.fashion_mnist(arguments.data, "train")
    trainer = Trainer(garments, CONFIG, compiled=arguments.compile)
    checkpoint = arguments.checkpoint
    decayed = checkpoint.with_suffix(".decay")
    start = decayed if arguments.decay_steps and decayed.exists() else checkpoint
    if start.exists():
        trainer.restore(torch.load(start, weights_only=True))
    elif arguments.start_from is not None:
        trainer.start_from(torch.load(arguments.start_from, weights_only=True))
    if arguments.decay_steps:
        trainer.run(0, decayed, decay_steps=arguments.decay_steps)
    elif not arguments.export:
        trainer.run(arguments.steps, checkpoint)
    if arguments.export:
        export(trainer, arguments.out)


if __name__ == "__main__":
    main()
