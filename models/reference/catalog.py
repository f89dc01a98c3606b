"""The reference models by name, with the clips on which they are calibrated and judged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from vcompress.models import load
from vcompress.models.calls import call_of
from vcompress.models.checkpoint import Checkpoint, read_safetensors
from vcompress.models.reference import moving_fashion, penvideo
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.strict_json import nearest

__all__ = ["REFERENCE_MODELS", "REFERENCE_PIPELINES", "load_reference", "reference_clips"]

Part = Literal["calibration", "test"]


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """A shipped recogniser: its asset file, labels and clip geometry."""

    asset: str
    labels: tuple[str, ...]
    clip: ClipSpec


REFERENCE_MODELS: dict[str, ReferenceModel] = {
    "penvideo20": ReferenceModel(
        asset="penvideo20",
        labels=penvideo.LABELS,
        clip=ClipSpec(num_frames=16, height=32, width=32, channels=1, std=(0.1,)),
    ),
    "moving-fashion": ReferenceModel(
        asset="moving_fashion",
        labels=moving_fashion.LABELS,
        clip=ClipSpec(num_frames=16, height=64, width=64, mean=(0.5,), std=(0.25,)),
    ),
}
REFERENCE_PIPELINES = ("bouncing-garments",)
_CALIBRATION_SEED = 2
_TEST_SEED = 1


def _entry(name: str) -> ReferenceModel:
    if name in REFERENCE_PIPELINES:
        message = f"{name} is a diffusion pipeline: it has prompts and no clips"
        raise InputError(message)
    if name not in REFERENCE_MODELS:
        message = (
            f"no reference model {name!r}; there are: {', '.join(REFERENCE_MODELS)}"
            f"{nearest(name, REFERENCE_MODELS)}"
        )
        raise InputError(message)
    return REFERENCE_MODELS[name]


def load_reference(name: str, calls: Path | None = None) -> VideoModel:
    """The shipped recogniser `name`, or the transformer of the shipped pipeline, in float32.

    Args:
        name: in `REFERENCE_MODELS` or `REFERENCE_PIPELINES`.
        calls: recorded calls of the transformer, for the shapes of its inputs.
    """
    if name in REFERENCE_PIPELINES:
        return _load_transformer(name, calls)
    entry = _entry(name)
    assets = resources.files("vcompress.models.reference") / "assets"
    if not (assets / f"{entry.asset}.safetensors").is_file():
        message = (
            f"the weights of reference:{name} do not ship with this version; train them with "
            f"python -m vcompress.models.reference.train {entry.asset} --data FOLDER"
        )
        raise MissingCapabilityError(message)
    config = json.loads((assets / f"{entry.asset}.json").read_text())
    with resources.as_file(assets / f"{entry.asset}.safetensors") as path:
        tensors, _ = read_safetensors(path)
    stored = Checkpoint(
        family="videomae",
        config=config,
        state_dict={key: tensor.float() for key, tensor in tensors.items()},
        labels=entry.labels,
        clip=entry.clip.as_dict(),
    )
    return load.from_checkpoint(
        stored, name=name, source=f"reference:{name}", options=load.LoadOptions()
    )


def _load_transformer(name: str, calls: Path | None) -> VideoModel:
    from vcompress.models.denoisers import example_call
    from vcompress.models.reference import bouncing_garments
    from vcompress.models.reference.diffusion_sampler import reference_pipeline

    module = reference_pipeline(name).transformer
    family, source = type(module).__name__, f"reference:{name}"
    if calls is not None:
        call = example_call(family, {}, calls, source)
    else:
        size = bouncing_garments.SIZE
        call = call_of({
            "hidden_states": torch.zeros(1, 1, bouncing_garments.NUM_FRAMES, size, size),
            "timestep": torch.full((1,), 500.0),
            "encoder_hidden_states": bouncing_garments.embed(torch.zeros(1, 3, dtype=torch.long)),
        })  # fmt: skip
    config = {**module.config, "_class_name": family}
    return load.wrap_denoiser(
        module, name=name, call=call, family=family, config=config, source=source
    )


def reference_clips(
    name: str, part: Part, *, limit: int | None = None, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Clips `[N, T, H, W, C]` uint8, labels `[N]` and names of a reference task.

    "test" is the test set (4,402 and 2,000 clips), "calibration" are 512 training clips; `limit`
    draws as many of them with `seed`.
    """
    _entry(name)
    if name == "penvideo20":
        movements, classes = penvideo.split("test" if part == "test" else "train")
        if part == "calibration":
            few = np.random.default_rng(_CALIBRATION_SEED).permutation(len(classes))[:512]
            movements, classes = movements[few], classes[few]
        chosen = _draw(len(classes), limit, seed)
        clips, labels = penvideo.render(movements[chosen]), classes[chosen]
    else:
        clips, labels = moving_fashion.compose(
            moving_fashion.split(part),
            moving_fashion.shipped_backgrounds(part),
            seed=_TEST_SEED if part == "test" else _CALIBRATION_SEED,
        )
        chosen = _draw(len(labels), limit, seed)
        clips, labels = clips[chosen], labels[chosen]
    return clips, labels, tuple(f"{part}-{index:05d}" for index in chosen)


def _draw(count: int, limit: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Sorted indices of at most `limit` of `count`, the same on every machine for a `seed`."""
    return np.sort(np.random.RandomState(seed).permutation(count)[:limit])
