"""A diffusers pipeline as a function from a prompt and a seed to a clip."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vcompress.models.directory import read_directory
from vcompress.spec import strict_json
from vcompress.spec.cache_section import LEAST_STEPS
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.validate.frames import Frames

__all__ = ["Case", "Sampler", "make_cases", "make_more", "open_sampler", "read_prompts"]

_REFERENCE = "reference:"
_DENOISERS = ("transformer", "transformer_2")
# Schedulers of models that were distilled to a few steps.
_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
# What is added to the seed.
_CONFIRMING, _OTHERS = 500, 1000

Prompt = str | dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one clip is generated from."""

    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.prompt if isinstance(self.prompt, str) else 'embeddings'} (seed {self.seed})"


class Sampler:
    """Generates clips with a pipeline.

    Attributes:
        name: of the pipeline.
        pipe: the diffusers pipeline.
        num_steps: denoising steps of a run.
    """

    def __init__(
        self, pipe: Any, *, name: str, num_steps: int | None = None, reference: bool = False,
        call: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Wrap `pipe`; `call` goes to every call of it, `reference` is for ours."""
        self.name, self.pipe, self._is_reference = name, pipe, reference
        self._call = dict(call or {})
        self._signature = inspect.signature(pipe.__call__)
        self.num_steps = num_steps or self._default_steps()
        if not self.denoisers:
            message = (
                f"{name}: {type(pipe).__name__} has no {' or '.join(_DENOISERS)}; caching is for "
                "diffusion transformers"
            )
            raise InputError(message)
        pipe.set_progress_bar_config(disable=True)

    @property
    def denoisers(self) -> list[nn.Module]:
        """Those that take turns in one run."""
        found = (getattr(self.pipe, name, None) for name in _DENOISERS)
        return [module for module in found if isinstance(module, nn.Module)]

    @property
    def cannot_pay(self) -> str | None:
        """Why caching cannot pay, if so."""
        if self.is_distilled:
            return (
                f"{type(self.pipe.scheduler).__name__} is for few-step (distilled) models, of "
                "which no two steps are alike enough: caching cannot pay, and nothing is cached"
            )
        if self.num_steps < LEAST_STEPS:
            return (
                f"caching cannot pay in {self.num_steps} steps, of which no two are alike enough: "
                f"nothing is cached; it takes {LEAST_STEPS} steps or more"
            )
        return None

    @property
    def is_distilled(self) -> bool:
        """Whether the scheduler is one of few-step models."""
        return type(self.pipe.scheduler).__name__ in _FEW_STEP_SCHEDULERS

    @torch.no_grad()
    def sample(self, case: Case) -> Frames:
        """The clip `[T, H, W, C]` of `case`, values in 0..1; latents where there is no decoder."""
        if self._is_reference:
            from vcompress.models.reference.diffusion_sampler import generate

            assert isinstance(case.prompt, str)
            clips = generate(self.pipe, [case.prompt], seed=case.seed, num_steps=self.num_steps)
            drawn: Frames = clips[0][..., None].astype(np.float32) / 255
            return drawn
        decodes = getattr(self.pipe, "vae", None) is not None
        given: dict[str, Any] = {
            "num_inference_steps": self.num_steps,
            "generator": torch.Generator().manual_seed(case.seed),
            "output_type": "pt" if decodes else "latent",
            **(case.prompt if isinstance(case.prompt, dict) else {"prompt": case.prompt}),
            **self._call,
        }
        unknown = sorted(given.keys() - self._signature.parameters.keys())
        if unknown:
            message = (
                f"{type(self.pipe).__name__} takes no {', '.join(unknown)}; caches are searched on "
                "pipelines from a prompt to frames"
            )
            raise InputError(message)
        output = self.pipe(**given)
        frames = output.frames if hasattr(output, "frames") else output.images
        clip = torch.as_tensor(frames)[0].float()
        if decodes:
            decoded: Frames = np.ascontiguousarray(clip.movedim(-3, -1).clamp(0, 1).numpy())
            return decoded
        # Latents [C, T, H, W] of about unit size; -4..4 is their range.
        latents: Frames = np.ascontiguousarray(((clip.movedim(0, -1) + 4) / 8).clamp(0, 1).numpy())
        return latents

    def _default_steps(self) -> int:
        if self._is_reference:
            from vcompress.models.reference.diffusion_sampler import NUM_STEPS

            return NUM_STEPS
        parameter = self._signature.parameters.get("num_inference_steps")
        if parameter is None or not isinstance(parameter.default, int):
            message = (
                f"{type(self.pipe).__name__} does not say how many steps it takes; add --steps"
            )
            raise InputError(message)
        return parameter.default


def open_sampler(
    source: str, *, num_steps: int | None = None, size: tuple[int, int, int] | None = None
) -> Sampler:
    """The pipeline in the folder `source`, or "reference:bouncing-garments".

    Args:
        source: where.
        num_steps: if not what the pipeline does by itself.
        size: frames, height and width, if not what the pipeline does by itself.

    Raises:
        InputError: no such pipeline.
        MissingCapabilityError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        message = "pipelines need diffusers: pip install 'vcompress-ai[diffusion]'"
        raise MissingCapabilityError(message) from error
    if source.startswith(_REFERENCE):
        from vcompress.models.reference.diffusion_sampler import reference_pipeline

        name = source.removeprefix(_REFERENCE)
        return Sampler(reference_pipeline(name), name=name, num_steps=num_steps, reference=True)
    folder = Path(source)
    if (folder / "bouncing_garments.json").is_file():
        from vcompress.models.reference.diffusion_sampler import load_pipeline

        return Sampler(
            load_pipeline(folder), name="bouncing-garments", num_steps=num_steps, reference=True
        )
    if not (folder / "model_index.json").is_file():
        message = (
            f"{source} is no folder of a diffusers pipeline (it has no model_index.json); save one "
            "with pipe.save_pretrained"
        )
        raise InputError(message)
    # Read here: diffusers reads some classes only where accelerate is installed.
    index = strict_json.read(folder / "model_index.json")
    modules: dict[str, Any] = {
        name: read_directory(folder / name)[0].float().eval()
        for name in _DENOISERS
        if (folder / name / "config.json").is_file()
    }
    modules |= {name: None for name, entry in index.items() if entry == [None, None]}
    # The general class takes no modules where the class of the pipeline has them optional.
    kind: Any = getattr(diffusers, str(index.get("_class_name")), diffusers.DiffusionPipeline)
    pipe = kind.from_pretrained(folder, local_files_only=True, **modules)
    call = {} if size is None else dict(zip(("num_frames", "height", "width"), size, strict=True))
    return Sampler(pipe, name=folder.resolve().name, num_steps=num_steps, call=call)


def read_prompts(path: Path | None, sampler: Sampler) -> list[Prompt]:
    """One a line of a text file, or the rows of `prompt_embeds` in a .pt file.

    Whatever else is in a .pt file goes to the pipeline: tensors row by row, numbers as they are;
    its num_inference_steps are those of `sampler` from then on.

    The reference pipeline has prompts of its own, if `path` is None.

    Raises:
        InputError: there are none.
    """
    if path is None:
        if sampler.name == "bouncing-garments":
            from vcompress.models.reference.bouncing_garments import DIRECTIONS, GARMENTS, SPEEDS

            return [
                f"{garment}, {DIRECTIONS[3 * index % 8]}, {SPEEDS[index % 2]}"
                for index, garment in enumerate(GARMENTS)
            ]
        message = "prompts are needed: add --prompts with a text file, one prompt a line"
        raise InputError(message)
    if not path.is_file():
        message = f"{path}: no such file of prompts"
        raise InputError(message)
    prompts: list[Prompt]
    if path.suffix == ".pt":
        stored = torch.load(path, weights_only=True)
        if not isinstance(stored, dict) or "prompt_embeds" not in stored:
            message = f"{path} must hold a dict with prompt_embeds [prompts, tokens, width]"
            raise InputError(message)
        count = len(stored["prompt_embeds"])
        sampler.num_steps = int(stored.pop("num_inference_steps", sampler.num_steps))
        prompts = [
            {
                name: value[index : index + 1] if isinstance(value, torch.Tensor) else value
                for name, value in stored.items()
            }
            for index in range(count)
        ]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        message = f"{path} has no prompts; write one a line"
        raise InputError(message)
    return prompts


def make_more(prompts: Sequence[Prompt], count: int, seed: int) -> list[Case]:
    """`count` cases to confirm on: prompts of those to calibrate on, other seeds."""
    return make_cases(prompts, count, seed + _CONFIRMING)[0]


def make_cases(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Case], list[Case]]:
    """`count` cases to calibrate on and `count` others.

    Others have other seeds always, and other prompts where there are two or more.
    """
    own = prompts[::2] if len(prompts) > 1 else prompts
    others = prompts[1::2] if len(prompts) > 1 else prompts
    calibration = [Case(own[index % len(own)], seed + index) for index in range(count)]
    held_out = [Case(others[index % len(others)], seed + _OTHERS + index) for index in range(count)]
    return calibration, held_out
