"""Recorded calls: what a denoiser is calibrated and judged on.

The samples are the rows of the calls. Rows of one generation are alike (the same text, the same
latents a step later), so what a model is judged on comes from other generations than what it was
calibrated on; within a part, rows are taken evenly over the steps.

Tensors keep the types that they were recorded in; they become float32, in which models are
compared, one batch at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from vcompress.calib.clips import Clips, permutation
from vcompress.models.call_file import CallFile, read_calls
from vcompress.models.calls import Call, as_computed, content_of
from vcompress.spec.errors import InputError

__all__ = ["Calls", "Samples", "clips_of", "load_calls"]


@dataclass(frozen=True, eq=False)
class _Row:
    """One sample: a row of a recorded call."""

    call: Call = field(repr=False)
    row: int
    generation: int
    step: int
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Calls:
    """At least one sample for a model that takes several named tensors.

    Stands where `Clips` stands for a model of clips; there are no labels, and nothing is skipped.

    Attributes:
        module_class: of the module that was called.
        rows: the samples, in order.
    """

    module_class: str
    rows: tuple[_Row, ...] = field(repr=False)

    labels: None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One name a sample, for people."""
        return tuple(row.name for row in self.rows)

    @property
    def generations(self) -> tuple[int, ...]:
        """Which run of the pipeline each sample comes from."""
        return tuple(row.generation for row in self.rows)

    @property
    def num_generations(self) -> int:
        """Runs of the pipeline that the samples come from."""
        return len(set(self.generations))

    @cached_property
    def digest(self) -> str:
        """Sha256 over all samples in order, their names, and what they share."""
        digest = hashlib.sha256(json.dumps(self.names).encode("ascii"))
        first = self.rows[0].call
        digest.update(repr(sorted(first.constants.items())).encode())
        for name, tensor in first.shared.items():
            _feed(digest, name, tensor)
        for row in self.rows:
            for name, tensor in row.call.tensors.items():
                _feed(digest, name, tensor[row.row])
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> Calls:
        """The samples of a slice."""
        return self.subset(range(*index.indices(len(self))))

    def subset(self, indices: Sequence[int]) -> Calls:
        """The samples at `indices`, in that order."""
        if len(indices) == 0:
            message = "a subset must hold at least one call, got no index"
            raise InputError(message)
        return Calls(
            module_class=self.module_class, rows=tuple(self.rows[index] for index in indices)
        )

    def spread(self, count: int) -> Calls:
        """`count` samples, or all where there are no more, evenly over the steps."""
        if count >= len(self):
            return self
        by_step = sorted(range(len(self)), key=lambda index: (self.rows[index].step, index))
        taken = [by_step[index * len(self) // count] for index in range(count)]
        return self.subset(sorted(taken))

    def split(self, share: float, seed: int) -> tuple[Calls, Calls]:
        """Two parts from different generations; the first has `share` of them, at least one.

        Raises:
            InputError: there is one generation alone.
        """
        generations = sorted({row.generation for row in self.rows})
        if len(generations) < 2:
            message = (
                "all calls come from one generation; at least two are needed, one to calibrate "
                "and one to test: run the pipeline with several prompts or seeds within one "
                "record_calls, or name a file of other calls with --data"
            )
            raise InputError(message)
        count = min(max(1, round(share * len(generations))), len(generations) - 1)
        order = permutation(len(generations), seed)
        held = {generations[index] for index in order[:count]}
        parts = (
            [index for index, row in enumerate(self.rows) if (row.generation in held) is first]
            for first in (True, False)
        )
        first, second = (self.subset(part) for part in parts)
        return first, second

    def tensors(self, size: int) -> Iterator[Call]:
        """Batches for the model, floating-point numbers as float32; the last may be smaller."""
        if size < 1:
            message = f"the batch size must be at least 1, got {size}"
            raise InputError(message)
        return (_stacked(self.rows[at : at + size]) for at in range(0, len(self), size))


Samples = Clips | Calls


def clips_of(samples: Samples) -> Clips:
    """`samples`, for what works on clips alone.

    Raises:
        InputError: they are calls.
    """
    if isinstance(samples, Clips):
        return samples
    message = f"this works for models of clips, got calls of a {samples.module_class}"
    raise InputError(message)


def _feed(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(content_of(tensor))


def _stacked(rows: Sequence[_Row]) -> Call:
    first = rows[0].call
    return as_computed(
        Call(
            tensors={
                name: torch.stack([row.call.tensors[name][row.row] for row in rows])
                for name in first.tensors
            },
            shared=first.shared,
            constants=first.constants,
        )
    )


def load_calls(path: Path) -> Calls:
    """All samples of the file of recorded calls at `path`.

    Raises:
        InputError: no such file, or not a file of calls.
    """
    found = read_calls(path)
    return Calls(module_class=found.module_class, rows=tuple(_rows(found)))


def _rows(found: CallFile) -> Iterator[_Row]:
    for one in found.calls:
        for row in range(len(one.call)):
            name = f"generation {one.generation} step {one.step} branch {one.branch}"
            yield _Row(
                one.call, row, one.generation, one.step,
                name if len(one.call) == 1 else f"{name} row {row}",
            )  # fmt: skip
