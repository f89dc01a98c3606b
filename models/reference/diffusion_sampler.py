"""The reference video diffusion transformer as a diffusers `WanPipeline`, and its two uses.

    pipe = reference_pipeline("bouncing-garments")
    clips = generate(pipe, ["sneaker, NE, fast", "bag, S, slow"], seed=0)      # [2, 16, 48, 48]
    ends = continue_clips(pipe, clips[:, :4], seed=0)

The transformer works on pixels, so the pipeline has no VAE and no text encoder: it is called with
prompt embeddings and gives latents, which are the frames in -1..1. It predicts the clip rather than
the velocity (`train_diffusion` says why), for which UniPC, the sampler that Wan comes with, has a
setting. Text to video is diffusers' own `__call__`. Continuation follows Wan 2.2 TI2V
(https://github.com/Wan-Video/Wan2.2): the tokens of known frames stay clean and carry time step 0,
the others carry that of the sampler. diffusers' pipeline for it insists on a VAE, so the loop is
written here.

Shapes: N clips, T frames, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from vcompress.models.checkpoint import read_safetensors
from vcompress.models.reference import bouncing_garments
from vcompress.models.reference.bouncing_garments import NUM_FRAMES, SIZE, Prompt
from vcompress.models.reference.catalog import REFERENCE_PIPELINES
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.strict_json import nearest

__all__ = [
    "GUIDANCE_SCALE", "NUM_STEPS", "build_pipeline", "continue_clips", "generate",
    "load_pipeline", "reference_pipeline", "to_frames", "to_latents",
]  # fmt: skip

NUM_STEPS = 50
GUIDANCE_SCALE = 2.0
SHIFT = 3.0  # of the noise levels towards the noisy end, as Wan at small sizes
# What `WanPipeline` without a VAE assumes of one: latents are 8 times smaller and 4 times shorter.
_CALL_SIZE = {"height": 8 * SIZE, "width": 8 * SIZE, "num_frames": 4 * (NUM_FRAMES - 1) + 1}


def build_pipeline(transformer: WanTransformer3DModel) -> WanPipeline:
    """A `WanPipeline` around `transformer`, without VAE and text encoder."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=SHIFT
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_pipeline(name: str) -> WanPipeline:
    """The shipped pipeline "bouncing-garments", float32, on the CPU.

    Raises:
        InputError: there is no such pipeline.
        MissingCapabilityError: its weights do not ship with this version.
    """
    if name not in REFERENCE_PIPELINES:
        message = (
            f"no reference pipeline {name!r}; there is: {', '.join(REFERENCE_PIPELINES)}"
            f"{nearest(name, REFERENCE_PIPELINES)}"
        )
        raise InputError(message)
    assets = resources.files("vcompress.models.reference") / "assets"
    if not (assets / "bouncing_garments.safetensors").is_file():
        message = (
            f"the weights of {name} do not ship with this version; train them with "
            "python -m vcompress.models.reference.train_diffusion --data FOLDER"
        )
        raise MissingCapabilityError(message)
    with resources.as_file(assets) as folder:
        return load_pipeline(folder)


def load_pipeline(folder: Path) -> WanPipeline:
    """The pipeline whose weights and description training wrote to `folder`."""
    config = json.loads((folder / "bouncing_garments.json").read_text())["transformer"]
    tensors, _ = read_safetensors(folder / "bouncing_garments.safetensors")
    transformer = WanTransformer3DModel(**config)
    transformer.load_state_dict({key: value.float() for key, value in tensors.items()})
    return build_pipeline(transformer)


def to_latents(clips: npt.NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Frames `[N, T, H, W]` uint8 as latents `[N, 1, T, H, W]` in -1..1."""
    return torch.as_tensor(clips)[:, None].float() / 127.5 - 1


def to_frames(latents: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Latents `[N, 1, T, H, W]` as frames `[N, T, H, W]` uint8."""
    pixels = ((latents[:, 0].float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).cpu().numpy()


def _embeddings(prompts: Sequence[str | Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `[N, 3, 32]` of the prompts and of none."""
    known = [prompt if isinstance(prompt, Prompt) else Prompt.parse(prompt) for prompt in prompts]
    labels = torch.tensor([prompt.label for prompt in known])
    dropped = torch.ones(len(known), dtype=torch.bool)
    return bouncing_garments.embed(labels), bouncing_garments.embed(labels, dropped)


def _generators(count: int, seed: int) -> list[torch.Generator]:
    """One a clip: what a clip looks like does not depend on the others in its batch."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def generate(
    pipe: WanPipeline,
    prompts: Sequence[str | Prompt],
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    **call: Any,
) -> npt.NDArray[np.uint8]:
    """Clips `[N, 16, 48, 48]` uint8 of the prompts; clip n is drawn from the noise of `seed + n`.

    `call` goes to the pipeline, for instance `callback_on_step_end`.

    Raises:
        InputError: a prompt cannot be read.
    """
    embeddings, negative = _embeddings(prompts)
    output = pipe(
        prompt_embeds=embeddings.to(pipe.device),
        negative_prompt_embeds=negative.to(pipe.device),
        generator=_generators(len(prompts), seed),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        **_CALL_SIZE,
        **call,
    )
    return to_frames(output.frames)


@torch.no_grad()
def continue_clips(
    pipe: WanPipeline, known: npt.NDArray[np.uint8], *, seed: int, num_steps: int = NUM_STEPS
) -> npt.NDArray[np.uint8]:
    """Clips `[N, 16, 48, 48]` uint8 that begin with the frames `known` `[N, k, 48, 48]`.

    Without a prompt: the known frames say what is to be seen. Clip n is drawn from the noise of
    `seed + n`.

    Raises:
        InputError: k is not a multiple of the patch's frames, or leaves nothing to generate.
    """
    transformer, scheduler = pipe.transformer, pipe.scheduler
    patch = transformer.config.patch_size
    count, num_known = known.shape[:2]
    if num_known % patch[0] or not 0 < num_known < NUM_FRAMES:
        message = (
            f"continuation starts from a multiple of {patch[0]} frames, at most "
            f"{NUM_FRAMES - patch[0]}; {num_known} are given; pass fewer or more frames"
        )
        raise InputError(message)
    clean = to_latents(known)
    noise = [
        torch.randn(1, NUM_FRAMES, SIZE, SIZE, generator=one) for one in _generators(count, seed)
    ]
    latents = torch.stack(noise)
    prompts = bouncing_garments.embed(
        torch.zeros(count, bouncing_garments.NUM_TOKENS, dtype=torch.long),
        torch.ones(count, dtype=torch.bool),
    )
    tokens_a_frame = (SIZE // patch[1]) * (SIZE // patch[2])
    free = torch.ones(NUM_FRAMES // patch[0], tokens_a_frame)
    free[: num_known // patch[0]] = 0
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    for index, time in enumerate(scheduler.timesteps):
        latents[:, :, :num_known] = clean
        context = {"step_index": index, "sigma": float(scheduler.sigmas[index])}
        with transformer.cache_context("cond", **context, num_inference_steps=num_steps):
            predicted = transformer(
                hidden_states=latents,
                timestep=(free.flatten() * time).expand(count, -1),
                encoder_hidden_states=prompts,
                return_dict=False,
            )[0]
        latents = scheduler.step(predicted, time, latents, return_dict=False)[0]
    latents[:, :, :num_known] = clean
    return to_frames(latents)
