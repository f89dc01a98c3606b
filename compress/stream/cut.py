"""Where a model can be cut so that features of frames may be kept from window to window.

What: of every module's output it is found out by running the model whether it is made of parts
that depend on few frames each, and neither on the others nor on where in the window they stand.
The model runs once on a window and once on each of the window's chunks alone; an output is kept
apart by frames if that of the window is that of its chunks, one behind the other. A module that
adds a position in time before this, mixes frames or normalises over all of them fails here,
whatever it is called: so VideoPrism, CLIP, SigLIP, DINOv2 and encoders of the form of ViViT's
model 2 (Arnab et al., 2021, arXiv:2103.15691) are cut behind their spatial encoder, and joint
models are not. The last such module is taken from which alone the model's output follows.

Everything is compared bit for bit, on frames of noise. Where results differ in the last bits
because a matrix product of few rows takes another way than one of many, an earlier module is
tried, then fewer frames at a time; where none is equal, the nearest is taken and its distance told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vcompress.compress.stream.stages import Seam, Stages, stages_at
from vcompress.compress.stream.watch import Run, Seen, ratio_axis, watched
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec

__all__ = ["Cut", "Uncut", "find_cut"]

_MAX_EQUAL, _MAX_CLOSE = 6, 3
_CLOSE = 1e-3
_MAX_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model in two stages and what that is worth.

    Attributes:
        module: behind which it is cut.
        stages: the two callables.
        difference: largest deviation from the model on a whole window, as a share of the largest
            output; 0 if all bits are equal.
        operations: multiplications of a window when only its new frames are encoded, as a share
            of all of them.
    """

    module: str
    stages: Stages
    difference: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class Uncut:
    """Why a model cannot be cut, as the end of a sentence that begins with its name."""

    reason: str


def find_cut(model: VideoModel, clip: ClipSpec, *, stride: int) -> Cut | Uncut:
    """The cut of `model` that keeps all bits and saves the most, if there is one.

    Frames are encoded as many at a time as divide the window and the stride: the most with which
    the bits are those of the model on a whole window, else the most.

    Args:
        clip: a window, T frames; the model's own or one of another length.
        stride: new frames of each window.
    """
    common = math.gcd(clip.num_frames, stride)
    chunks = [size for size in range(common, 0, -1) if common % size == 0]
    operations = _operations(model.module, clip)
    nearest: Cut | None = None
    refused: list[Uncut] = []
    for chunk in chunks:
        found = _cut(model.module, clip, chunk, stride, operations)
        if isinstance(found, Uncut):
            refused.append(found)
        elif not found.difference:
            return found
        else:
            nearest = nearest or found
    if nearest is not None:
        return nearest
    for other in (2, 4, 8):
        fits = common % other and clip.num_frames > other and clip.num_frames % other == 0
        if fits and isinstance(_cut(model.module, clip, other, other, operations), Cut):
            return Uncut(
                reason=f"makes each feature from {other} frames, so that the stride must be a "
                f"multiple of {other}, got {stride}; use --stride "
                f"{stride - stride % other or other}"
            )
    return refused[0]


def _operations(module: nn.Module, clip: ClipSpec) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(_noise(clip))
    total: int = counter.get_total_flops()
    return total


def _cut(
    module: nn.Module, clip: ClipSpec, chunk: int, stride: int, operations: int
) -> Cut | Uncut:
    window = _noise(clip)
    axis = clip.layout.index("T")
    parts = [part.contiguous() for part in torch.split(window, chunk, dim=axis)]
    first = watched(module, parts[0], lambda _name, _shape: None, 1)
    if first.result is None and not first.outputs:
        return Uncut(
            reason=f"does not run on {chunk} of its {clip.num_frames} frames: {first.error}"
        )
    shapes = {name: seen.shape for name, seen in first.outputs.items()}
    whole = watched(
        module, window, lambda name, shape: ratio_axis(shape, shapes.get(name, ()), len(parts)),
        len(parts),
    )  # fmt: skip
    if whole.result is None:
        return Uncut(reason=f"does not run on {clip.num_frames} frames: {whole.error}")
    known = whole.outputs
    apart = [
        watched(module, part, lambda name, _: known[name].axis if name in known else None, 1)
        for part in parts
    ]
    nearest, poor = None, None
    for name in _candidates(whole, apart):
        cut = _tried(module, known, name, parts, axis, whole.result)
        if cut is None:
            continue
        share = _step_operations(cut.stages, parts[0], stride // chunk) / max(1, operations)
        cut = replace(cut, operations=share)
        if share > _MAX_SHARE:
            poor = poor or cut
        elif not cut.difference:
            return cut
        elif nearest is None or cut.difference < nearest.difference:
            nearest = cut
    if nearest is not None:
        return nearest
    if poor is not None:
        return Uncut(
            reason=f"sees frames for themselves only in its first {poor.module}, and all else "
            f"anew in every window: {poor.operations:.0%} of the operations would be left"
        )
    return Uncut(
        reason="mixes frames, or adds where in the window they stand, from its first layers on"
    )


def _step_operations(stages: Stages, part: torch.Tensor, num_chunks: int) -> int:
    """Operations of a window of which `num_chunks` chunks like `part` are new."""
    with FlopCounterMode(display=False) as encoding:
        rows = stages.encode(part)
    features = torch.zeros((stages.rows, *rows.shape[1:]), dtype=rows.dtype)
    with FlopCounterMode(display=False) as answering:
        stages.answer(features)
    total: int = num_chunks * encoding.get_total_flops() + answering.get_total_flops()
    return total


def _candidates(whole: Run, apart: Sequence[Run]) -> list[str]:
    """Modules whose output for a window is that of its chunks; the last first, equal bits first."""
    equal, close = [], []
    for name, seen in reversed(list(whole.outputs.items())):
        pieces = [run.outputs.get(name) for run in apart]
        found = [piece for piece in pieces if piece is not None and piece.digests]
        if not seen.digests or len(found) < len(apart):
            continue
        if seen.digests == tuple(piece.digests[0] for piece in found):
            equal.append(name)
        elif _is_close(torch.cat([piece.samples for piece in found]), seen.samples):
            close.append(name)
    return equal[:_MAX_EQUAL] + close[:_MAX_CLOSE]


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.allclose(first, second, rtol=_CLOSE, atol=_CLOSE * float(second.abs().max())))


def _tried(
    module: nn.Module, outputs: Mapping[str, Seen], name: str, parts: Sequence[torch.Tensor],
    frame_axis: int, expected: torch.Tensor,
) -> Cut | None:  # fmt: skip
    """The cut behind `name`, if the output of `module` follows from it alone."""
    names = list(outputs)
    earlier = [other for other in names[: names.index(name)] if not name.startswith(f"{other}.")]
    outermost = [
        other for other in earlier if not any(other.startswith(f"{each}.") for each in earlier)
    ]
    seen = outputs[name]
    assert seen.axis is not None, "candidates have parts"
    seam = Seam(
        module=name, shape=seen.shape, axis=seen.axis, dtype=seen.dtype,
        before=[(each, outputs[each].shape, outputs[each].dtype) for each in outermost],
    )  # fmt: skip
    chunk = parts[0].shape[frame_axis]
    window = torch.cat(list(parts), dim=frame_axis)
    stages = stages_at(module, seam, window, window=chunk * len(parts), chunk=chunk)
    got = stages.answer(torch.cat([stages.encode(part) for part in parts]))
    if got.shape != expected.shape:
        return None
    scale = float(expected.abs().max()) or 1.0
    difference = float((got - expected).abs().max()) / scale
    if not difference <= _CLOSE:
        return None
    return Cut(module=name, stages=stages, difference=difference, operations=1.0)


def _noise(clip: ClipSpec) -> torch.Tensor:
    """A window of noise `[1, *clip.input_shape]`; every frame differs."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, *clip.input_shape)
    if clip.dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.rand(shape, generator=generator)
