"""How long each layer takes in each format: a table, and what a choice of formats costs by it.

What: an operation is a layer with the sizes that it has in one call, written as one word such as
`linear:1568x768x3072`; layers with the same word are one entry for each format. The table says
where its times come from, and a format that an operation has no time in is no option for it: a
simulated format has no latency.
A table is JSON, so that it can be measured on another machine, or written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vcompress.compress.attention_sites import find_attentions
from vcompress.models.calls import run_module
from vcompress.models.video import VideoModel
from vcompress.spec import strict_json
from vcompress.spec.attention_section import PRODUCT_FORMATS
from vcompress.spec.errors import InputError
from vcompress.spec.files import replace_file
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import check_keys, nearest, significant

__all__ = [
    "SCHEMA", "LatencyEntry", "LatencyTable", "ModelTimes", "find_operations", "operation_sizes",
]  # fmt: skip

SCHEMA = 1
Source = Literal["measured", "estimate"]
_SOURCES = ("measured", "estimate")


@dataclass(frozen=True, kw_only=True)
class LatencyEntry:
    """The time of one operation in one format.

    Attributes:
        operation: as `find_operations` writes it.
        format: a name in `spec.formats.FORMATS`, for an attention one in `PRODUCT_FORMATS`, or
            "keep".
        seconds: of one call.
        spread: between the quartiles of the calls, as a share of `seconds`; None if not measured.
    """

    operation: str
    format: str
    seconds: float
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Times of one machine.

    Attributes:
        source: "measured", or "estimate" for what was computed from a data sheet.
        runtime: what ran, or what the estimate assumes.
        device: on what.
        model_seconds: of the whole float model, so that what the table has no entry for counts
            too; None if only the entries count.
        entries: at most one for each operation and format.
    """

    source: Source
    runtime: str
    device: str
    model_seconds: float | None
    entries: tuple[LatencyEntry, ...]

    @property
    def seconds(self) -> dict[tuple[str, str], float]:
        """(operation, format) -> seconds."""
        return {(each.operation, each.format): each.seconds for each in self.entries}

    @property
    def formats(self) -> tuple[str, ...]:
        """All formats that anything has a time in, in the order of the entries."""
        return tuple(dict.fromkeys(each.format for each in self.entries))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, times at four significant digits."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "runtime": self.runtime,
            "device": self.device,
            "model_seconds": None
            if self.model_seconds is None
            else significant(self.model_seconds, 4),
            "entries": [
                {
                    "operation": each.operation,
                    "format": each.format,
                    "seconds": significant(each.seconds, 4),
                    "spread": None if each.spread is None else significant(each.spread, 2),
                }
                for each in self.entries
            ],
        }

    def save(self, path: Path) -> None:
        """Write the file `path`."""
        replace_file(path, strict_json.dump(self.as_dict()))

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read the file `path`; everything that is wrong is an `InputError`."""
        return cls.from_dict(strict_json.read(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "latency table") -> LatencyTable:
        """Read a table."""
        keys = ("schema", "source", "runtime", "device", "model_seconds", "entries")
        check_keys(data, required=keys, where=where)
        if data["schema"] != SCHEMA or data["source"] not in _SOURCES:
            message = (
                f"{where}: schema must be {SCHEMA} and source one of {', '.join(_SOURCES)}, got "
                f"{data['schema']!r} and {data['source']!r}"
            )
            raise InputError(message)
        for key in ("runtime", "device"):
            if not isinstance(data[key], str):
                message = f"{where}: {key} must be a string, got {data[key]!r}"
                raise InputError(message)
        if not isinstance(data["entries"], list):
            message = f"{where}: entries must be a list of objects"
            raise InputError(message)
        model_seconds = data["model_seconds"]
        if model_seconds is not None:
            _check_time(model_seconds, f"{where}: model_seconds")
        entries = tuple(
            _entry(each, f"{where}: entries[{index}]") for index, each in enumerate(data["entries"])
        )
        pairs = [(each.operation, each.format) for each in entries]
        if len(set(pairs)) < len(pairs):
            twice = next(pair for pair in pairs if pairs.count(pair) > 1)
            message = f"{where}: {twice[0]} in {twice[1]} has two entries; keep one"
            raise InputError(message)
        return cls(
            source=data["source"], runtime=data["runtime"], device=data["device"],
            model_seconds=model_seconds, entries=entries,
        )  # fmt: skip


def _entry(data: Any, where: str) -> LatencyEntry:
    check_keys(data, required=("operation", "format", "seconds"), optional=("spread",), where=where)
    known = tuple(dict.fromkeys((*FORMATS, *PRODUCT_FORMATS, FLOAT)))
    if data["format"] not in known:
        message = (
            f"{where}: unknown format {data['format']!r}{nearest(str(data['format']), known)}; "
            f"choose one of: {', '.join(known)}"
        )
        raise InputError(message)
    if not isinstance(data["operation"], str):
        message = f"{where}: operation must be a string, got {data['operation']!r}"
        raise InputError(message)
    _check_time(data["seconds"], f"{where}: seconds")
    if data.get("spread") is not None:
        _check_time(data["spread"], f"{where}: spread", smallest=0.0)
    return LatencyEntry(**data)


def _check_time(value: Any, where: str, *, smallest: float = 1e-12) -> None:
    # JSON's true is an integer for Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not smallest <= value < 1e6:
        message = f"{where} must be a number of at least {smallest:g}, got {value!r}"
        raise InputError(message)


def find_operations(model: VideoModel) -> dict[str, tuple[str, ...]]:
    """The operation of each call of every layer and attention of `model`, for one sample.

    Linears are `linear:ROWSxINPUTSxOUTPUTS`, convolutions
    `conv3d:INPUT*WEIGHT/STRIDE/PADDING/DILATION/GROUPS`, attentions
    `attention:ROWSxQUERIESxKEYSxWIDTHxVALUEWIDTH` with a row a sample and head.
    """
    example = model.example(1)
    found: dict[str, list[str]] = {}
    handles = []
    for name, facts in model.layers.items():

        def note(
            layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any],
            name: str = name, kind: str = facts.kind,
        ) -> None:  # fmt: skip
            shape = tuple((*inputs, *keywords.values())[0].shape)
            found.setdefault(name, []).append(_word(layer, kind, shape))

        handles.append(model.layer(name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.inference_mode():
            run_module(model.module, example)
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in find_attentions(model.module, example).items():
        found[name] = [
            "attention:"
            + _sizes((c.num_rows, c.num_queries, c.num_keys, c.width, c.value_width))
            for c in calls
        ]  # fmt: skip
    return {name: tuple(calls) for name, calls in found.items()}


def _word(layer: Any, kind: str, shape: tuple[int, ...]) -> str:
    if kind == "linear":
        return f"linear:{_sizes((math.prod(shape[:-1]), *layer.weight.shape[::-1]))}"
    geometry = "/".join(
        value if isinstance(value, str) else _sizes(value)
        for value in (layer.stride, layer.padding, layer.dilation)
    )
    return f"{kind}:{_sizes(shape)}*{_sizes(layer.weight.shape)}/{geometry}/{layer.groups}"


def _sizes(values: Iterable[int]) -> str:
    return "x".join(str(int(value)) for value in values)


def operation_sizes(operation: str) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """Kind and sizes of an operation: those of a linear or an attention, or input and weight."""
    kind, _, rest = operation.partition(":")
    shapes = rest.partition("/")[0].split("*")
    return kind, tuple(tuple(int(size) for size in shape.split("x")) for shape in shapes)


class ModelTimes:
    """What choices of formats cost one model by a table."""

    def __init__(self, table: LatencyTable, operations: Mapping[str, tuple[str, ...]]) -> None:
        """Look up the float times.

        Args:
            table: of the machine.
            operations: of the model, see `find_operations`.

        Raises:
            InputError: an operation of a layer has no time in float.
        """
        self._operations = operations
        self._seconds = table.seconds
        needed = {
            word
            for calls in operations.values()
            for word in calls
            if operation_sizes(word)[0] != "attention"
        }
        missing = sorted(word for word in needed if (word, FLOAT) not in self._seconds)
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" * (len(missing) > 3))
            message = (
                f"the latency table has no time in {FLOAT} for {shown}; measure a table of this "
                "model with vcompress latency"
            )
            raise InputError(message)
        kept = sum(self._seconds.get((word, FLOAT), 0.0) for c in operations.values() for word in c)
        self.model_seconds = max(kept, table.model_seconds or 0.0)
        self._kept = kept

    def of(self, name: str, format_name: str) -> float | None:
        """Seconds of all calls of `name` in the format; None if one has no time."""
        times = [self._seconds.get((word, format_name)) for word in self._operations.get(name, ())]
        return None if None in times else sum(time for time in times if time is not None)

    def slowdown(self, name: str, format_name: str) -> float | None:
        """How many times as long as in float `name` takes; None if one has no time."""
        seconds, kept = self.of(name, format_name), self.of(name, FLOAT)
        return None if seconds is None or not kept else seconds / kept

    def together(self, formats: Mapping[str, str]) -> float | None:
        """Seconds of the layers of `formats`; None if one has no time."""
        times = [self.of(name, format_name) for name, format_name in formats.items()]
        return None if None in times else sum(time for time in times if time is not None)

    def rest(self, decided: Iterable[str]) -> float:
        """Seconds of the float model without those of the layers that are `decided`."""
        return self.model_seconds - sum(self.of(name, FLOAT) or 0.0 for name in decided)
