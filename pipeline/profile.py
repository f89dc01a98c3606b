"""Profile a model: run it under torch's profiler and put its operators into classes.

A module's own operators are those called while it is the innermost one that runs. An attention is
spatial, temporal or both by the length of its sequence: of the places of one frame, of the frames,
or of all tokens. See `validate.profile` for what comes out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vcompress.models.calls import Batch, run_module
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import TokenGrid, VideoModel
from vcompress.pipeline.run import Progress, Silent
from vcompress.validate.latency import describe_device
from vcompress.validate.profile import SPATIAL, TEMPORAL, LayerTime, Profile, ceilings

__all__ = ["profile_model"]

_MARK = "vcompress/"
_WARM_UP = 2
# Reading an event takes longer than most operators of a small model.
_LEAST_CALLS, _MOST_CALLS, _LEAST_SECONDS = 4, 10, 2.0
_NUM_OPERATORS = 8


def _attention_operations(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of both products, from shapes `[B, H, L, D]` and `[B, H, S, D]`."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# Torch's counter does not know the kernel for a CPU.
_CPU_ATTENTION: Any = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations
}


@dataclass
class _Seen:
    """What one module was given and did."""

    tokens: int = 0
    bytes: int = 0
    by_class: dict[str, float] = field(default_factory=dict)


def profile_model(
    source: str | VideoModel, *, batch_size: int = 1, load: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Profile:  # fmt: skip
    """Where the time of one call of the float model goes, in torch on this machine's CPU.

    Args:
        source: as in `pipeline.quantize`.
        batch_size: clips, or samples, of a call.
        load: how the model is read.
        progress: is told how far it is.

    Raises:
        InputError: the model is wrong.
    """
    progress = progress or Silent()
    with progress.stage("load"):
        model = source if isinstance(source, VideoModel) else load_model(source, load)
    example, module = model.example(batch_size), model.module
    with torch.inference_mode():
        with progress.stage("time"):
            plain = _timed(module, example)
        with progress.stage("count operations"):
            operations = _operations(module, example)
        with progress.stage("profile"):
            seen, total, rest, measured = _watched(model, example, plain)
    layers = tuple(
        LayerTime(
            name=name, kind=_kind(each.by_class),
            in_block=any(f"{name}.".startswith(f"{block}.") for block in model.blocks),
            tokens=each.tokens, bytes=each.bytes, operations=operations.get(name, 0),
            seconds=sum(each.by_class.values()), by_class=each.by_class,
        )
        for name, each in seen.items()
        if each.by_class
    )  # fmt: skip
    classes: dict[str, float] = {}
    for layer in layers:
        for name, seconds in layer.by_class.items():
            classes[name] = classes.get(name, 0.0) + seconds
    return Profile(
        model=model.name, runtime=f"torch {torch.__version__}",
        device=describe_device(torch.get_num_threads()), batch_size=batch_size,
        threads=torch.get_num_threads(), measured_seconds=measured, profiled_seconds=total,
        classes=dict(sorted(classes.items(), key=lambda each: -each[1])), operators=rest,
        layers=layers,
        ceilings=ceilings(
            layers, total, has_tokens=model.token_grid is not None,
            is_denoiser=model.task == "denoise",
        ),
    )  # fmt: skip


def _kind(by_class: Mapping[str, float]) -> str:
    """The class of the longest operator that has a name."""
    named = {name: seconds for name, seconds in by_class.items() if name != "rest"}
    return max(named, key=named.__getitem__) if named else "rest"


def _timed(module: nn.Module, example: Batch) -> float:
    """Seconds of one call, as a first guess."""
    for _ in range(_WARM_UP):
        run_module(module, example)
    started = time.perf_counter()
    run_module(module, example)
    return time.perf_counter() - started


def _operations(module: nn.Module, example: Batch) -> dict[str, int]:
    """Floating-point operations that each module does itself, by full name."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter:
        run_module(module, example)
    root = type(module).__name__
    inclusive = {
        "" if name == root else name.removeprefix(f"{root}."): sum(found.values())
        for name, found in counter.get_flop_counts().items()
        if name != "Global"
    }
    own = dict(inclusive)
    for name, count in inclusive.items():
        # Of the nearest module above that was counted.
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= count
                break
    return own


def _watched(
    model: VideoModel, example: Batch, seconds: float
) -> tuple[dict[str, _Seen], float, dict[str, float], float]:
    """What each module did, seconds of a call, those of operators of the rest, those unwatched.

    Calls are watched and not watched in turn. Of each kind the one that was least disturbed counts.
    """
    calls = math.ceil(_LEAST_SECONDS / max(seconds, 1e-6))
    best: tuple[float, dict[str, _Seen], dict[str, float]] | None = None
    plain = math.inf
    for _ in range(min(max(calls, _LEAST_CALLS), _MOST_CALLS)):
        started = time.perf_counter()
        run_module(model.module, example)
        plain = min(plain, time.perf_counter() - started)
        seen: dict[str, _Seen] = {}
        with (
            _marked(model.module, seen),
            profile(
                activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
            ) as found,
            record_function(_MARK),
        ):
            run_module(model.module, example)
        total, rest = _attribute(found.events() or [], seen, model.token_grid)
        if best is None or total < best[0]:
            best = total, seen, rest
    assert best is not None
    return best[1], best[0], best[2], plain


@contextmanager
def _marked(module: nn.Module, seen: dict[str, _Seen]) -> Iterator[None]:
    """Let every module tell the profiler when it runs, and note what enters and leaves it."""
    handles = []
    open_marks: list[Any] = []

    def enter(name: str) -> Any:
        def hook(_: nn.Module, _inputs: Any) -> None:
            mark = record_function(_MARK + name)
            mark.__enter__()  # type: ignore[no-untyped-call]
            open_marks.append(mark)

        return hook

    def leave(name: str) -> Any:
        def hook(each: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
            open_marks.pop().__exit__(None, None, None)
            if name not in seen:
                entered = _tensors((inputs, keywords))
                first = entered[0] if entered else None
                weights = list(each.parameters(recurse=False))
                seen[name] = _Seen(
                    tokens=0 if first is None or first.dim() < 2
                    else math.prod(first.shape[:-1]) if isinstance(each, nn.Linear | nn.LayerNorm)
                    else int(first.shape[0]),
                    bytes=sum(x.nbytes for x in (*entered, *_tensors(output), *weights)),
                )  # fmt: skip

        return hook

    for name, each in module.named_modules():
        seen.setdefault("", _Seen())
        if name:
            handles.append(each.register_forward_pre_hook(enter(name)))
            handles.append(each.register_forward_hook(leave(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _attribute(
    events: Sequence[Any], seen: dict[str, _Seen], grid: TokenGrid | None
) -> tuple[float, dict[str, float]]:
    """Give each operator's time to the module that called it; microseconds become seconds."""
    total, rest = 0.0, dict[str, float]()
    for event in events:
        is_mark = event.name.startswith(_MARK)
        owner = event if is_mark else event.cpu_parent
        if owner is None or not owner.name.startswith(_MARK):
            continue
        name = owner.name.removeprefix(_MARK)
        if is_mark:
            # What passes between the operators: the interpreter, and views that cost nothing.
            kind, spent = "rest", event.self_cpu_time_total
            total += event.cpu_time_total if not name else 0.0
            label = "between operators"
        else:
            kind, spent = _class_of(event, name, grid), event.cpu_time_total
            label = event.name.removeprefix("aten::")
        spent = spent / 1e6
        module = seen.setdefault(name, _Seen())
        module.by_class[kind] = module.by_class.get(kind, 0.0) + spent
        if kind == "rest":
            rest[label] = rest.get(label, 0.0) + spent
        if kind.endswith("attention"):
            # Of queries, scores or probabilities: rows are what attends.
            module.tokens = int(event.input_shapes[0][-2])
    longest = sorted(rest.items(), key=lambda each: -each[1])[:_NUM_OPERATORS]
    return total / 1e6, dict(longest)


_NORMS = ("norm", "rms")
_PRODUCTS = ("aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum")


def _class_of(event: Any, owner: str, grid: TokenGrid | None) -> str:
    name = event.name
    if "conv" in name:
        return "convolution"
    if name == "aten::scaled_dot_product_attention":
        queries, keys = event.input_shapes[:2]
        return _attention(int(queries[-2]), int(keys[-2]), owner, grid)
    if name in {"aten::linear", "aten::addmm", "aten::mm"}:
        return "linear"
    if name in _PRODUCTS:
        shapes = [shape for shape in event.input_shapes if len(shape) > 1]
        # Two stacks of matrices are an attention written out; a weight is one matrix.
        between = len(shapes) > 1 and all(len(shape) > 2 for shape in shapes[:2])
        return _attention(int(shapes[0][-2]), 0, owner, grid) if between else "linear"
    if name in {"aten::softmax", "aten::_softmax"} and len(event.input_shapes[0]) > 2:
        return _attention(int(event.input_shapes[0][-2]), 0, owner, grid)
    if any(word in name for word in _NORMS):
        return "normalisation"
    return "rest"


def _attention(queries: int, keys: int, owner: str, grid: TokenGrid | None) -> str:
    if keys not in (0, queries):
        return "cross attention"
    if grid is None or grid.arrangement == "joint":
        return "attention"
    places, extra = grid.height * grid.width, grid.special
    is_time = queries in {grid.frames, grid.frames + extra}
    is_space = queries in {places, places + extra, places + 1}
    if is_time and is_space:
        is_time = "temporal" in owner or "time" in owner
        is_space = not is_time
    return TEMPORAL if is_time else SPATIAL if is_space else "attention"
