"""Which patches a plan merges on a given clip: followed through the model, drawn on the frames.

Only the plan's section `tokens` is executed, on the weights as they were trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vcompress.calib.clips import Clips
from vcompress.calib.load import load_clips
from vcompress.calib.preprocess import to_frames
from vcompress.calib.sources import REFERENCE_PREFIX, open_clips
from vcompress.compress.tensors import TOKENS
from vcompress.compress.tokens.attention import TokenState
from vcompress.compress.tokens.fitting import fitted_blocks
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.origin import recorded_source
from vcompress.pipeline.planning import read_plan
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec.artifact import MANIFEST, Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.files import check_file
from vcompress.spec.plan import CompressionPlan, check_plan
from vcompress.spec.token_section import TokenSection
from vcompress.validate.token_picture import TokenMap, draw_token_picture, require_matplotlib

__all__ = ["FollowedSite", "TokenView", "follow_tokens", "view_tokens"]

# More rows than these make a picture that nobody reads.
_MAX_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class FollowedSite:
    """One reduction on one clip.

    Attributes:
        block: that sees the result.
        technique, keep: as in the plan.
        origin: `[T, h, w]`, patches with the same number are one token from here on; -1 for those
            that were dropped.
    """

    block: str
    technique: str
    keep: int
    origin: npt.NDArray[np.int64]

    def counts(self) -> dict[str, int]:
        """How many tokens stand for several patches and for one, and how many patches are gone."""
        sizes = Counter(self.origin[self.origin >= 0].tolist()).values()
        return {
            "num_merged_tokens": sum(size > 1 for size in sizes),
            "num_single_tokens": sum(size == 1 for size in sizes),
            "num_dropped_patches": int((self.origin < 0).sum()),
            "largest_token": max(sizes, default=0),
        }


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """What became of the patches of one clip.

    Attributes:
        model: its name.
        clip: the name of the clip.
        section: of the plan.
        sites: in the order of the model, without those that reduce nothing.
    """

    model: str
    clip: str
    section: TokenSection
    sites: tuple[FollowedSite, ...]

    @property
    def num_result(self) -> int:
        """Patch tokens after the last reduction."""
        return self.sites[-1].keep

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "command": "inspect", "model": self.model, "clip": self.clip,
            "tokens": self.section.as_dict(),
            "sites": [
                {
                    "block": site.block, "technique": site.technique, "keep": site.keep,
                    **site.counts(), "origin": site.origin.tolist(),
                }
                for site in self.sites
            ],
        }  # fmt: skip


def view_tokens(
    file: Path, clip: str, output: Path, *, source: str | None = None,
    progress: Progress | None = None,
) -> TokenView:  # fmt: skip
    """Draw which patches of `clip` the plan in `file` merges into the PNG `output`.

    Args:
        file: an artifact, or a plan.
        clip: a video, an .npz or .pt file of clips (the first is taken), or `reference:NAME`.
        source: of the model, as for `load_model`; by default the file or the reference that the
            artifact was made from.

    Raises:
        InputError: something is missing or does not fit, or the plan reduces no tokens.
        MissingCapabilityError: matplotlib is not installed.
    """
    progress = progress or Silent()
    check_file(output)
    require_matplotlib()
    path, manifest = _open(file)
    plan = CompressionPlan.load(path)
    if plan.tokens is None:
        message = (
            f"{file}: this plan reduces no tokens, so there is nothing to draw; --tokens of "
            "vcompress quantize and vcompress plan makes one that does"
        )
        raise InputError(message)
    with progress.stage("load"):
        model = _load(file, plan, manifest, source)
    with progress.stage("follow tokens"):
        clips = _open_clip(clip, model.clip)
        tensors = read_plan(path)[1].get(TOKENS, {}) if fitted_blocks(plan.tokens) else {}
        view = follow_tokens(model, plan.tokens, clips, tensors)
    with progress.stage("draw"):
        _draw(view, model, clips, output)
    return view


def follow_tokens(
    model: VideoModel, section: TokenSection, clips: Clips,
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> TokenView:  # fmt: skip
    """Run the first of `clips` through a copy of `model` with the reductions of `section`.

    Args:
        model: without reduction.
        section: of the plan.
        clips: of which the first is taken.
        tensors: of the section's fitted techniques.

    Raises:
        InputError: the section does not fit the model, or keeps all tokens.
    """
    grid = model.token_grid
    working = model.copy()
    state = apply_reduction(working, section, tensors)
    if state is None or grid is None:
        message = "the section tokens of the plan keeps every token; there is nothing to draw"
        raise InputError(message)
    state.trace = True
    seen: dict[str, torch.Tensor] = {}
    for name in working.token_blocks:
        if name in section.sites:
            # Set after the hook that reduces, so it runs after that one.
            working.layer(name).register_forward_pre_hook(_Note(name, state, seen))
    working(torch.from_numpy(clips[0][None]))
    sites, last = [], None
    for name, origin in seen.items():
        if origin is not last:
            site = section.sites[name]
            shape = (grid.frames, grid.height, grid.width)
            sites.append(
                FollowedSite(
                    block=name, technique=site.technique, keep=site.keep,
                    origin=_by_clip(origin).reshape(shape),
                )
            )  # fmt: skip
        last = origin
    return TokenView(model=model.name, clip=clips.names[0], section=section, sites=tuple(sites))


@dataclass(frozen=True)
class _Note:
    """Notes where the patches are in front of a block."""

    block: str
    state: TokenState
    seen: dict[str, torch.Tensor]

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...]) -> None:
        if self.state.origin is not None:
            self.seen[self.block] = self.state.origin


def _by_clip(origin: torch.Tensor) -> npt.NDArray[np.int64]:
    """Places `[B', N]` that each sequence of a clip counts from 0, to numbers of the clip's own."""
    first = torch.arange(len(origin))[:, None] * origin.shape[1]
    return torch.where(origin >= 0, origin + first, origin).numpy()


def _open(file: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """Where the plan in `file` is, and the manifest if it is an artifact."""
    if file.is_dir() or file.name == MANIFEST:
        artifact = Artifact.open(file if file.is_dir() else file.parent)
        path = artifact.file("plan")
        if path is None:
            message = f"{artifact.path} has no plan; make the artifact again"
            raise InputError(message)
        return path, artifact.manifest
    if file.suffix != ".json":
        what = "not an artifact directory or a plan.json" if file.exists() else "no such file"
        message = f"{file}: {what}; --tokens draws what the plan in one of these does"
        raise InputError(message)
    return file, None


def _load(
    file: Path, plan: CompressionPlan, manifest: Mapping[str, Any] | None, source: str | None
) -> VideoModel:
    """The model that `plan` was made for, fed as the artifact was."""
    if source is None:
        source = recorded_source(file, manifest)
    model = load_model(source)
    if model.weights_sha256 != plan.model.get("weights_sha256"):
        message = (
            f"{source} has the weights {model.weights_sha256[:12]}, but {file} was made for "
            f"{str(plan.model.get('weights_sha256'))[:12]}; name that model with --model"
        )
        raise InputError(message)
    # The picture shows tokens; attentions are checked where a plan is executed.
    check_plan(
        plan, layers=model.layers, blocks=model.blocks, weights_sha256=model.weights_sha256,
        attentions=tuple(plan.attention or ()),
    )  # fmt: skip
    if manifest is not None:
        model = replace(model, inputs=ClipSpec.from_dict(dict(manifest["clip"])))
    return model


def _open_clip(source: str, spec: ClipSpec) -> Clips:
    """The first clip of `source`."""
    if source.startswith(REFERENCE_PREFIX):
        return open_clips(source, spec, part="test", limit=1, seed=0, labels=())
    if Path(source).is_dir():
        message = f"{source} is a folder; --tokens takes one video, or an .npz or .pt file of clips"
        raise InputError(message)
    return load_clips(source, spec)[:1]


def _draw(view: TokenView, model: VideoModel, clips: Clips, path: Path) -> None:
    frames = to_frames(clips[0], model.clip)
    num_shown = len(view.sites[-1].origin)
    starts = [round(index * len(frames) / num_shown) for index in range(num_shown + 1)]
    techniques = list(dict.fromkeys(_words(site.technique) for site in view.sites))
    share = 100 * view.num_result / view.section.num_patches
    attention = view.section.attention.partition("_")[0]
    last = len(view.sites)
    rows = min(last, _MAX_ROWS)
    shown = [view.sites[(row + 1) * last // rows - 1] for row in range(rows)]
    try:
        draw_token_picture(
            frames[starts[:-1]],
            [
                TokenMap(label=_label(site, len(techniques) > 1), origin=site.origin)
                for site in shown
            ],
            title=(
                f"{view.model}: {view.section.num_patches} patch tokens \N{RIGHTWARDS ARROW} "
                f"{view.num_result} ({share:.0f} %), {' + '.join(techniques)}, "
                f"{attention} attention"
            ),
            frame_labels=[_frame_label(*pair) for pair in pairwise(starts)],
            path=path,
        )
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror or error}; choose another --output"
        raise InputError(message) from error


def _label(site: FollowedSite, with_technique: bool) -> str:
    lines = [f"before {'.'.join(site.block.split('.')[-2:])}", f"{site.keep} tokens"]
    return "\n".join([*lines, _words(site.technique)] if with_technique else lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _frame_label(start: int, end: int) -> str:
    return f"frame {end}" if end - start == 1 else f"frames {start + 1}-{end}"
