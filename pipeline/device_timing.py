"""Measure a latency table on a device that runs the kernels of `compress.kernels`.

What: each distinct linear layer runs in float and in every format that has a kernel, in turn, so
that what disturbs one disturbs all; so does the whole float model. Of each, the call that was
least disturbed counts. On a GPU the time is that between two events, of a CUDA graph of the call
where it can be captured: a model that is not held up by its own launches runs so. Everything is
computed in bfloat16 there, which is what the formats are compared with; the whole model by
autocast. Convolutions have their float time alone, attentions none.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels.available import needs_triton
from vcompress.compress.kernels.linear import ExecutableLinear
from vcompress.compress.latency_table import (
    LatencyEntry,
    LatencyTable,
    find_operations,
    operation_sizes,
)
from vcompress.models.calls import run_module
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Progress
from vcompress.spec.errors import MissingCapabilityError
from vcompress.spec.formats import FLOAT, FORMATS
from vcompress.validate.latency import describe_device

__all__ = ["graphed", "measure_on_device", "time_in_turn"]

_WARM_UP = 3
_ROUNDS = 20
# A call that is shorter is repeated, so that a clock can tell it.
_SHORTEST = 2e-4


def measure_on_device(
    model: VideoModel, formats: Sequence[str], device: str, progress: Progress, *,
    rounds: int = _ROUNDS,
) -> LatencyTable:  # fmt: skip
    """Time every distinct operation of `model` on `device`, in float and in `formats`.

    Args:
        model: whose layers are timed; it is not changed.
        formats: of plans; those without a kernel get no time.
        device: "cuda", "cuda:1" or, to try it, "cpu".
        progress: is told how far it is.
        rounds: how often each call is timed.

    Raises:
        MissingCapabilityError: there is no such device, or no triton for it.
    """
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            message = f"there is no GPU for device={device!r}; leave it out to measure ONNX Runtime"
            raise MissingCapabilityError(message)
        needs_triton()
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    operations = find_operations(model)
    places: dict[str, str] = {}
    for name, calls in operations.items():
        for word in calls:
            places.setdefault(word, name)
    entries: list[LatencyEntry] = []
    with progress.stage("measure layers", len(places)) as advance, torch.inference_mode():
        for word, name in places.items():
            kind, shapes = operation_sizes(word)
            if kind != "attention":
                runners = _runners(model, name, kind, shapes, formats, place, dtype)
                times = time_in_turn(runners, place, rounds=rounds)
                entries += [
                    LatencyEntry(operation=word, format=each, seconds=low, spread=spread)
                    for each, (low, spread) in times.items()
                ]
            advance(1)
        whole = model.copy().module.to(place)
        example = model.example(1).to(place)

        def run() -> object:
            with torch.autocast(place.type, dtype, enabled=place.type == "cuda"):
                return run_module(whole, example)

        ((low, _),) = time_in_turn({FLOAT: graphed(run, place)}, place, rounds=rounds).values()
    return LatencyTable(
        source="measured", runtime=_runtime(dtype), device=_described(place), model_seconds=low,
        entries=tuple(entries),
    )  # fmt: skip


def _runners(
    model: VideoModel, name: str, kind: str, shapes: tuple[tuple[int, ...], ...],
    formats: Sequence[str], place: torch.device, dtype: torch.dtype,
) -> dict[str, Callable[[], object]]:  # fmt: skip
    """A call of the layer in float, and of each form of it that has a kernel."""
    layer = model.layer(name)
    shape = shapes[0][:2] if kind == "linear" else shapes[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    amax = float(x.abs().amax())
    forms: dict[str, nn.Module] = {}
    if kind == "linear":
        for format_name in formats:
            if format_name in FORMATS and model.layers[name].objection(format_name) is None:
                frozen = freeze(layer, format_name, amax, name=name)
                assert isinstance(frozen, FrozenLinear)
                forms[format_name] = ExecutableLinear(frozen).to(place)
    x = x.to(place, dtype)
    forms[FLOAT] = _copied(layer, place, dtype)

    def call(form: nn.Module) -> Callable[[], object]:
        return lambda: form(x)

    calls = {each: call(forms[each]) for each in (FLOAT, *(n for n in forms if n != FLOAT))}
    return {each: graphed(run, place) for each, run in calls.items()}


def _copied(layer: nn.Module, place: torch.device, dtype: torch.dtype) -> nn.Module:
    from copy import deepcopy

    return deepcopy(layer).to(place, dtype)


def graphed(run: Callable[[], object], place: torch.device) -> Callable[[], object]:
    """`run` as the replay of a CUDA graph, or as it is where none can be captured."""
    if place.type != "cuda":
        return run
    stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(place))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream(place).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize(place)
        return run
    return graph.replay


def time_in_turn(
    runners: dict[str, Callable[[], object]], place: torch.device, *, rounds: int = _ROUNDS
) -> dict[str, tuple[float, float]]:
    """Seconds of the least disturbed call, and the quartiles' distance over the median, by name."""
    repeats = {}
    for name, run in runners.items():
        for _ in range(_WARM_UP):
            run()
        repeats[name] = max(1, int(_SHORTEST / max(_seconds(run, 1, place), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            found[name].append(_seconds(run, repeats[name], place))
    return {name: (min(times), _spread(times)) for name, times in found.items()}


def _seconds(run: Callable[[], object], repeats: int, place: torch.device) -> float:
    if place.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(repeats):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / repeats


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / statistics.median(times)


def _runtime(dtype: torch.dtype) -> str:
    return f"torch {torch.__version__}, kernels of vcompress, {str(dtype).removeprefix('torch.')}"


def _described(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    device = describe_device(torch.get_num_threads())
    return f"{device['cpu']}, {device['num_usable_cores']} cores"
