"""Graphs that take other numbers of frames, heights and widths than the model was loaded with.

`torch.export` leaves an axis free where nothing that it traced stands against it; that says nothing
of the model, which may refuse the size or compute something else there. So a graph with free axes
is run at a second shape, twice the first one, and compared with the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vcompress.calib.calls import Samples
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import BuildError, InputError
from vcompress.spec.plan import CompressionPlan
from vcompress.spec.strict_json import nearest

if TYPE_CHECKING:
    from vcompress.export.runtime import Session

__all__ = ["AXES", "check_dynamic", "check_second_shape", "free_axes_of"]

AXES: Mapping[str, str] = {"frames": "T", "height": "H", "width": "W"}
_FACTOR = 2


def check_dynamic(model: VideoModel, dynamic: Sequence[str]) -> None:
    """Raise an `InputError` where `dynamic` cannot be asked of `model`."""
    for axis in dynamic:
        if axis not in AXES:
            message = f"--dynamic takes {', '.join(AXES)}; got {axis!r}{nearest(axis, AXES)}"
            raise InputError(message)
    if dynamic and not isinstance(model.inputs, ClipSpec):
        message = f"--dynamic is for models of clips, and {model.name} takes {model.inputs}"
        raise InputError(message)


def free_axes_of(
    model: VideoModel, plan: CompressionPlan, dynamic: Sequence[str]
) -> dict[int, str]:
    """Number of each axis that is to be free -> what its size is called.

    Raises:
        InputError: tokens are reduced, whose numbers are fixed in the plan.
    """
    if dynamic and plan.tokens is not None:
        message = (
            f"--dynamic {','.join(dynamic)}: the plan keeps fixed numbers of tokens, so the sizes "
            "of a clip are fixed; leave out --dynamic or --tokens"
        )
        raise InputError(message)
    return {model.clip.layout.index(AXES[axis]): axis for axis in dynamic}


def check_second_shape(
    planned: VideoModel, session: Session, path: Path, test: Samples, axes: Mapping[int, str]
) -> tuple[int, ...]:
    """Compare the graph with its module at twice the sizes; returns the shape that was run.

    Raises:
        BuildError: the module does not take it, or the graph computes something else.
    """
    # What it needs is not there on every machine that plans.
    from vcompress.pipeline.equivalence import parity_of, run_torch

    clip = next(test.tensors(1))
    assert isinstance(clip, torch.Tensor)
    for axis in axes:
        clip = clip.repeat_interleave(_FACTOR, dim=axis)
    shape = tuple(clip.shape)
    try:
        run_torch(planned, clip)
    # A module may fail in any way at a size that it was not made for.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = (
            f"--dynamic {','.join(axes.values())}: {planned.name} itself does not take clips of "
            f"shape {list(shape)} ({reason}); leave out the axes that it fixes"
        )
        raise BuildError(message) from error
    parity_of(planned, session, path, [clip, clip.flip(-1)], f"{path.name} at {list(shape)}")
    return shape
