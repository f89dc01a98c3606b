"""Clips: what a model is calibrated and judged on.

Videos are kept as uint8 frames and become float32 inputs one batch at a time: a quarter of the
memory, and the digest covers what was decoded rather than what arithmetic made of it.

Legend: N clips, T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from vcompress.calib.preprocess import to_model_input
from vcompress.models.calls import Batch
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["Clips", "permutation"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Clips(Sequence[Array]):
    """At least one clip, each ready to become one input of the model that `spec` describes.

    Attributes:
        spec: how frames become an input.
        data: either uint8 frames `[N, T, H, W, C]`, or inputs `[N, *spec.input_shape]` of
            `spec.dtype` that need no further step.
        names: one name a clip, for people.
        labels: one class index a clip, or None.
        skipped: (name, reason) of what the source held but could not be used.
    """

    spec: ClipSpec
    data: Array = field(repr=False)
    names: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_data(self.data, self.spec)
        for what, values in (("names", self.names), ("labels", self.labels)):
            if values is not None and len(values) != len(self.data):
                message = (
                    f"{what}: one is needed for each of {len(self.data)} clips, got {len(values)}"
                )
                raise InputError(message)

    @classmethod
    def from_frames(
        cls,
        frames: Array,
        spec: ClipSpec,
        labels: Sequence[int] | Array | None = None,
        names: Sequence[str] | None = None,
    ) -> Clips:
        """Clips from decoded frames `[N, T, H, W, C]` uint8 in memory.

        Raises:
            InputError: shape, dtype, labels or names do not fit.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != _frames_shape(spec):
            message = (
                f"frames must be uint8 of shape [N, {_listed(_frames_shape(spec))}], got "
                f"{frames.dtype} of shape {list(frames.shape)}"
            )
            raise InputError(message)
        return cls.from_array(frames, spec, labels=labels, names=names)

    @classmethod
    def from_array(
        cls,
        data: Array,
        spec: ClipSpec,
        *,
        labels: Sequence[int] | Array | None = None,
        names: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
        skipped: tuple[tuple[str, str], ...] = (),
    ) -> Clips:
        """Clips from frames or from ready inputs, told apart by dtype and shape (see `data`).

        Clips without names are called `clip[0]`, `clip[1]` and so on. Those that hold NaN or
        infinity are left out, with the reason in `skipped`, if there are others.
        """
        if names is None:
            names = [f"clip[{index}]" for index in range(len(data))] if data.ndim else []
        classes = None if labels is None else _label_indices(labels, label_names)
        finite = _finite(data)
        if 0 < len(finite) < len(data) == len(names) and len(data) == len(
            names if classes is None else classes
        ):
            kept = set(finite)
            skipped = (*skipped, *(
                (name, "holds NaN or infinity")
                for index, name in enumerate(names)
                if index not in kept
            ))  # fmt: skip
            data, names = data[finite], [names[index] for index in finite]
            classes = None if classes is None else tuple(classes[index] for index in finite)
        return cls(spec=spec, data=data, names=tuple(names), labels=classes, skipped=skipped)

    @cached_property
    def digest(self) -> str:
        """Sha256 over all clips in order and their names; labels and `skipped` do not count."""
        digest = hashlib.sha256()
        head = {"dtype": self.data.dtype.name, "shape": self.data.shape, "names": self.names}
        digest.update(json.dumps(head).encode("ascii"))
        for clip in self.data:
            digest.update(np.ascontiguousarray(clip).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Clips: ...
    def __getitem__(self, index: int | slice) -> Array | Clips:
        """One model input without a batch axis; a slice gives `Clips`."""
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        clip: Array = self.data[index]
        if _holds_frames(self.data, self.spec):
            return to_model_input(clip, self.spec)
        return clip.copy()

    def batches(self, size: int) -> Iterator[Array]:
        """Model inputs `[n, *spec.input_shape]` in order, n = `size`; the last may be smaller."""
        if size < 1:
            message = f"the batch size must be at least 1, got {size}"
            raise InputError(message)
        return (
            np.stack([self[index] for index in range(start, min(start + size, len(self)))])
            for start in range(0, len(self), size)
        )

    def tensors(self, size: int) -> Iterator[Batch]:
        """The same as `batches`, as tensors."""
        return (torch.from_numpy(batch) for batch in self.batches(size))

    def subset(self, indices: Sequence[int]) -> Clips:
        """The clips at `indices`, in that order, as a copy with nothing in `skipped`."""
        if len(indices) == 0:
            message = "a subset must hold at least one clip, got no index"
            raise InputError(message)
        return Clips(
            spec=self.spec,
            data=self.data[np.asarray(indices, np.int64)],
            names=tuple(self.names[index] for index in indices),
            labels=None if self.labels is None else tuple(self.labels[index] for index in indices),
        )

    def sample(self, count: int, seed: int) -> Clips:
        """`count` clips, or all where there are no more, drawn in an order that `seed` fixes."""
        return self.subset(permutation(len(self), seed)[:count])

    def split(self, share: float, seed: int) -> tuple[Clips, Clips]:
        """Two disjoint parts in the original order; the first has `share` of the clips, rounded.

        It has at least one, since a share of a few clips is still to be tested on.

        Raises:
            InputError: one part would be empty.
        """
        count = max(1, round(share * len(self))) if 0 < share < 1 else 0
        if not 0 < count < len(self):
            message = (
                f"both parts of a split must hold a clip; {share:g} of {len(self)} clips leaves "
                "one empty, use more clips or another share"
            )
            raise InputError(message)
        order = permutation(len(self), seed)
        return self.subset(sorted(order[:count])), self.subset(sorted(order[count:]))


def _label_indices(
    labels: Sequence[int] | Array, label_names: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Class indices as plain integers, each at least 0 and below the number of `label_names`."""
    try:
        array = np.asarray(labels)
    except ValueError as error:
        message = f"labels must be integers of shape [N]: {error}"
        raise InputError(message) from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        message = (
            f"labels must be integers of shape [N], got {array.dtype} of shape {list(array.shape)}"
        )
        raise InputError(message)
    end = len(label_names) if label_names is not None else None
    for position, label in enumerate(array.tolist()):
        if label < 0 or (end is not None and label >= end):
            allowed = "at least 0" if end is None else f"in 0..{end - 1}"
            message = f"labels must be {allowed}, got {label} for clip {position}"
            raise InputError(message)
    return tuple(array.tolist())


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in an order that `seed` fixes."""
    # RandomState, because NumPy guarantees its stream forever.
    order: list[int] = np.random.RandomState(seed).permutation(count).tolist()
    return order


def _frames_shape(spec: ClipSpec) -> tuple[int, ...]:
    return spec.num_frames, spec.height, spec.width, spec.channels


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _finite(data: Array) -> list[int]:
    """The clips that hold neither NaN nor infinity."""
    if data.dtype.kind != "f" or not data.ndim:
        return list(range(len(data))) if data.ndim else []
    return [index for index, clip in enumerate(data) if np.isfinite(clip).all()]


def _holds_frames(data: Array, spec: ClipSpec) -> bool:
    return data.dtype == np.uint8 and data.shape[1:] == _frames_shape(spec)


def _check_data(data: Array, spec: ClipSpec) -> None:
    ready = data.dtype == np.dtype(spec.dtype) and data.shape[1:] == spec.input_shape
    if not (ready or _holds_frames(data, spec)) or data.ndim != 5:
        message = (
            f"clips must be uint8 frames [N, {_listed(_frames_shape(spec))}] (T, H, W, C) or "
            f"{spec.dtype} inputs [N, {_listed(spec.input_shape)}] ({', '.join(spec.layout[1:])}), "
            f"got {data.dtype} of shape {list(data.shape)}"
        )
        raise InputError(message)
    if not len(data):
        message = "at least one clip is needed, got none"
        raise InputError(message)
    finite = _finite(data)
    if len(finite) < len(data):
        index = next(index for index, at in enumerate([*finite, -1]) if index != at)
        message = f"clips must be finite; clip {index} holds NaN or infinity, remove it"
        raise InputError(message)
