"""Measure a latency table: every distinct layer of a model in each format that really runs here.

What: each layer and attention with sizes of its own is exported alone, in float and in every
format, as the portable graph of a plan would have it, and all of these graphs are timed in turn
with the float model (see `validate.latency`). A format counts only if ONNX Runtime fused an integer
kernel for it; everything else is simulated on this machine and gets no time. What calling the
runtime itself takes is measured too, and taken off. Of each, the call that was least disturbed
counts: a median of long calls holds more of what else the machine does than one of short calls, and
times of layers are to add up to that of the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.frozen import freeze
from vcompress.compress.latency_table import (
    LatencyEntry,
    LatencyTable,
    find_operations,
    operation_sizes,
)
from vcompress.compress.roofline import estimate
from vcompress.export.runtime import INTEGER_KERNELS, Session, open_session
from vcompress.models.calls import Batch, named_arrays
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.pipeline.device_timing import measure_on_device
from vcompress.pipeline.order import check_plan_output
from vcompress.pipeline.run import Progress, Silent
from vcompress.spec.attention_section import PRODUCT_FORMATS, AttentionChoice
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.spec.strict_json import nearest
from vcompress.validate.latency import describe_device, measure_interleaved

__all__ = ["ROOFLINE", "measure_latency", "measure_table", "table_for"]

ROOFLINE = "roofline"
_ROUNDS = 10
_WARM_UP = 2
_MIN_SECONDS = 2.0
# A call takes at least so much of its measured time: the rest cannot all be the runtime's own.
_LEAST_SHARE = 0.1
# ONNX Runtime has integer kernels on a CPU, and none for other formats.
_WITH_KERNELS = ("int8",)
_MODEL, _EMPTY = "model", "empty"


def table_for(
    working: VideoModel, model: VideoModel, formats: Sequence[str], source: str | None,
    progress: Progress,
) -> LatencyTable:  # fmt: skip
    """The table that a plan is made with.

    Args:
        working: whose layers are timed; its tokens may be merged.
        model: the float model, whose time the budget is a share of.
        formats: of the target.
        source: a file, "roofline", or None to measure here.
        progress: told that times are an estimate.
    """
    if source == ROOFLINE:
        words = [word for calls in find_operations(working).values() for word in calls]
        table = estimate(words, formats)
    elif source is not None:
        table = LatencyTable.load(Path(source))
    else:
        table = measure_table(working, formats, progress, whole=model)
    if table.source == "estimate":
        progress.warn(
            f"times are an estimate ({table.runtime}, {table.device}), not measured: they rank "
            "formats and predict no latency"
        )
    return table


def measure_latency(
    source: str | VideoModel, path: Path, *, formats: Sequence[str] | None = None,
    load: LoadOptions | None = None, progress: Progress | None = None, force: bool = False,
    device: str | None = None,
) -> LatencyTable:  # fmt: skip
    """Measure the table of the model at `source` here, and write it to `path`.

    Args:
        source: as in `pipeline.quantize`.
        path: of the JSON file.
        formats: of plans; by default all. Those without a kernel here get no time.
        load: how the model is read.
        progress: is told how far it is.
        force: replace `path`.
        device: run the kernels of `compress.kernels` there, "cuda" say; by default ONNX Runtime.

    Raises:
        InputError: the model is wrong, a format is unknown, or `path` cannot be written.
    """
    check_plan_output(path, force=force)
    known = tuple(dict.fromkeys((*FORMATS, *PRODUCT_FORMATS)))
    wanted = known if formats is None else tuple(formats)
    for name in wanted:
        if name not in known:
            message = f"unknown format {name!r}{nearest(name, known)}; known: {', '.join(known)}"
            raise InputError(message)
    progress = progress or Silent()
    with progress.stage("load"):
        model = source if isinstance(source, VideoModel) else load_model(source, load)
    if device is None:
        table = measure_table(model, wanted, progress)
    else:
        table = measure_on_device(model, wanted, device, progress)
    table.save(path)
    return table


@dataclass(frozen=True)
class _Subject:
    """A graph that is timed: what it stands for, and the calls of the runtime."""

    operation: str
    format: str
    run: Callable[[], object]
    session: Session


def measure_table(
    model: VideoModel, formats: Sequence[str], progress: Progress, *,
    whole: VideoModel | None = None,
) -> LatencyTable:  # fmt: skip
    """Time every distinct operation of `model` in float and in those of `formats` that run here.

    Args:
        model: whose layers are timed.
        formats: of plans.
        progress: is told how far it is.
        whole: the float model that is timed as one; `model` by default.

    Raises:
        MissingCapabilityError: ONNX Runtime is missing.
    """
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        folder = Path(name)
        subjects = _subjects(model, formats, folder, progress)
        example = model.example(1)
        module = (whole or model).module
        graph = _session(PrimaryOutput(module, example), example, folder / "model.onnx")
        nothing = torch.zeros(1, 1)
        empty = _session(nn.Identity(), nothing, folder / "empty.onnx")
        runners: dict[str, Callable[[], object]] = {
            _MODEL: partial(graph.run_named, named_arrays(example, graph.input_names)),
            _EMPTY: partial(empty.run_named, named_arrays(nothing, empty.input_names)),
            **{f"{each.operation} {each.format}": each.run for each in subjects},
        }
        with progress.stage("measure latency", None):
            measured = measure_interleaved(
                runners, warm_up=_WARM_UP, rounds=_ROUNDS, min_seconds=_MIN_SECONDS
            )
        device = describe_device(torch.get_num_threads())
    overhead = measured[_EMPTY].min_ms
    entries = []
    for subject in subjects:
        found = measured[f"{subject.operation} {subject.format}"]
        own = max(found.min_ms - overhead, _LEAST_SHARE * found.min_ms)
        entries.append(
            LatencyEntry(
                operation=subject.operation, format=subject.format, seconds=own / 1e3,
                spread=found.iqr_ms / found.p50_ms,
            )
        )  # fmt: skip
    return LatencyTable(
        source="measured", runtime=f"ONNX Runtime, {', '.join(graph.providers)}",
        device=f"{device['cpu']}, {device['num_usable_cores']} cores",
        model_seconds=(measured[_MODEL].min_ms - overhead) / 1e3, entries=tuple(entries),
    )  # fmt: skip


def _subjects(
    model: VideoModel, formats: Sequence[str], folder: Path, progress: Progress
) -> list[_Subject]:
    """One graph for each operation and each format that has a kernel for it."""
    places: dict[str, str] = {}
    for name, calls in find_operations(model).items():
        for word in calls:
            places.setdefault(word, name)
    subjects: list[_Subject] = []
    with progress.stage("export layers", len(places)) as advance:
        for index, (word, name) in enumerate(places.items()):
            kind, shapes = operation_sizes(word)
            forms, example = (
                _attention_forms(shapes[0], formats)
                if kind == "attention"
                else _layer_forms(model, name, kind, shapes, formats)
            )
            for format_name, module in forms.items():
                path = folder / f"{index}-{format_name}.onnx"
                session = _session(module, example, path)
                if format_name == FLOAT or INTEGER_KERNELS & session.kernels().keys():
                    run = partial(session.run_named, named_arrays(example, session.input_names))
                    subjects.append(_Subject(word, format_name, run, session))
            advance(1)
    return subjects


def _session(module: nn.Module, example: Batch, path: Path) -> Session:
    # Planning for other budgets works without the packages that exporting needs.
    from vcompress.export.graph import export_onnx

    # With a fixed batch ONNX Runtime makes a Gemm of tokens [1, N, K], which it fuses to nothing.
    export_onnx(module, example, path, dialect="portable")
    return open_session(path)


def _layer_forms(
    model: VideoModel, name: str, kind: str, shapes: tuple[tuple[int, ...], ...],
    formats: Sequence[str],
) -> tuple[Mapping[str, nn.Module], torch.Tensor]:  # fmt: skip
    """The layer in float and in its formats, and an input for it."""
    layer = model.layer(name)
    # Tokens come as [1, N, K], and their linears as products; a single row as one [1, K].
    rows, inputs = shapes[0][:2]
    shape = shapes[0] if kind != "linear" else (rows, inputs) if rows == 1 else (1, rows, inputs)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    amax = float(example.abs().amax())
    forms: dict[str, nn.Module] = {FLOAT: layer}
    for format_name in formats:
        if format_name in _WITH_KERNELS and model.layers[name].objection(format_name) is None:
            forms[format_name] = freeze(layer, format_name, amax, name=name)
    return forms, example


class _Attention(nn.Module):
    """Attention over query, key and value that come as one input `[B, 3, R, N, D]`."""

    def __init__(self, products: AttentionProducts | None) -> None:
        super().__init__()
        self.products = products

    def forward(self, operands: torch.Tensor) -> torch.Tensor:
        """`[B, 3, R, N, D]` to `[B, R, N, D]`."""
        query, key, value = operands.unbind(1)
        if self.products is not None:
            mixed: torch.Tensor = self.products(query, key, value)
            return mixed
        return functional.scaled_dot_product_attention(query, key, value)


def _attention_forms(
    sizes: tuple[int, ...], formats: Sequence[str]
) -> tuple[Mapping[str, nn.Module], torch.Tensor]:
    """Attention in float and in its formats; none where queries and keys differ in size."""
    rows, queries, keys, width, value_width = sizes
    if (queries, width) != (keys, value_width):
        return {}, torch.zeros(1)
    shape = (1, 3, rows, queries, width)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    amax = float(np.abs(example.numpy()).max())
    forms: dict[str, nn.Module] = {FLOAT: _Attention(None)}
    for format_name in formats:
        if format_name in _WITH_KERNELS:
            choice = AttentionChoice(
                format=format_name, reason="", query_amax=amax, key_amax=amax, value_amax=amax,
                smooth_keys=True,
            )  # fmt: skip
            forms[format_name] = _Attention(AttentionProducts(choice))
    return forms, example
