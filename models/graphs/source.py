"""From a graph file (`.onnx`, `.pt2`) to a module whose layers and blocks can be found by running.

A graph says which clips it takes: their sizes, and most often which axis is which. What it does
not say (how frames are sampled and normalised) comes from the flags, or from what vcompress itself
wrote into an ONNX file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from vcompress.models.graphs.attention import with_attention
from vcompress.models.graphs.batch import InParts, free_batch
from vcompress.models.graphs.blocks import Shapes, recorded_shapes, with_blocks
from vcompress.models.graphs.onnx_file import OnnxFile, read_onnx
from vcompress.models.graphs.onnx_module import translate
from vcompress.models.graphs.parity import (
    check_parity,
    departs_at,
    onnx_runner,
    random_clips,
    takes_any_batch,
)
from vcompress.models.graphs.program import read_program, rebuilt
from vcompress.models.video import primary_output
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["SUFFIXES", "GraphModel", "graph_of_onnx", "load_graph"]

SUFFIXES = (".onnx", ".pt2")
_NUM_AXES = 5


@dataclass(frozen=True, kw_only=True)
class GraphModel:
    """A graph as a module.

    Attributes:
        module: from clips to the first output; a graph, or `InParts`.
        blocks: full names of its repeated blocks.
        clip: what it takes.
        classifies: its output is a row of numbers for every clip.
        name, task, labels: what vcompress wrote into the file, else empty.
        parity: largest relative L2 to the file itself.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    clip: ClipSpec
    classifies: bool
    name: str = ""
    task: str = ""
    labels: tuple[str, ...] = ()
    parity: float = 0.0


def load_graph(path: Path, *, clip: ClipSpec | None, trust_pickle: bool) -> GraphModel:
    """Read `path`, make a module of it, and check that it computes the same.

    Args:
        clip: what `--input-spec` says; needed where an axis other than the batch is free, or
            where the sizes do not tell the axes apart.
        trust_pickle: for `.pt2`, which can run code when it is loaded.

    Raises:
        InputError: the file is damaged, quantized already, not trusted, takes other tensors than
            clips, has operators that are not known, or is not computed alike.
        MissingCapabilityError: ONNX Runtime is not installed.
    """
    if path.suffix == ".onnx":
        file = read_onnx(path)
        graph = graph_of_onnx(file, clip)
        parity = check_parity(
            graph.module, onnx_runner(file), _shape(file.input_shape[0], graph.clip),
            graph.clip.dtype, half=file.half, path=path,
            locate=lambda clips: departs_at(file, translate(file), clips, file.half),
        )  # fmt: skip
        return replace(graph, parity=parity)
    program = read_program(path, trust_pickle=trust_pickle)
    clip = _checked_clip(path, program.input_shape, program.dtype, clip)
    graph = _assembled(path, rebuilt(program), clip, program.input_shape[0], {})

    def run(clips: torch.Tensor) -> torch.Tensor:
        return primary_output(program.module(clips.to(getattr(torch, program.dtype))))

    shape = _shape(program.input_shape[0], clip)
    parity = check_parity(graph.module, run, shape, clip.dtype, half=program.half, path=path)
    return replace(graph, parity=parity)


def graph_of_onnx(file: OnnxFile, clip: ClipSpec | None = None) -> GraphModel:
    """The module of `file`, not yet checked against it; see `load_graph`."""
    own = file.own
    if clip is None and isinstance(own.get("clip"), dict):
        clip = ClipSpec.from_dict(own["clip"])
    clip = _checked_clip(file.path, file.input_shape, file.dtype, clip)
    return _assembled(file.path, translate(file), clip, file.input_shape[0], own)


def _shape(batch: Any, clip: ClipSpec) -> tuple[int, ...]:
    return (batch if isinstance(batch, int) else 1, *clip.input_shape)


def _assembled(
    path: Path, flat: fx.GraphModule, clip: ClipSpec, batch: Any, own: Mapping[str, Any]
) -> GraphModel:
    """The module with its blocks, for any batch."""
    flat = flat.float().eval().requires_grad_(False)
    clips = random_clips(_shape(batch, clip), clip.dtype, 0)
    try:
        shapes = recorded_shapes(flat, clips)
        if with_attention(flat, shapes):
            shapes = recorded_shapes(flat, clips)
        with torch.inference_mode():
            output = flat(clips)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300]
        message = f"{path} does not run on clips of shape {tuple(clips.shape)}: {reason}"
        raise InputError(message) from error
    module, blocks = _for_any_batch(flat, shapes, clips, is_fixed=isinstance(batch, int))
    return GraphModel(
        module=module, blocks=blocks, clip=clip,
        classifies=output.ndim == 2 and output.shape[1] > 1,
        name=str(own.get("name", "")), task=str(own.get("task", "")),
        labels=tuple(str(label) for label in own.get("labels", ())),
    )  # fmt: skip


def _for_any_batch(
    flat: fx.GraphModule, shapes: Shapes, clips: torch.Tensor, *, is_fixed: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """`flat` with blocks: as it is, with its batch set free, or else one part after the other."""
    relaxed = copy.deepcopy(flat)
    if is_fixed:
        free_batch(relaxed, dict(zip(relaxed.graph.nodes, shapes.values(), strict=True)))
    if takes_any_batch(relaxed, clips):
        return relaxed, with_blocks(relaxed, recorded_shapes(relaxed, clips))
    blocks = with_blocks(flat, shapes)
    return InParts(flat, clips.shape[0]), blocks


def _checked_clip(
    path: Path, shape: tuple[Any, ...], dtype: str, clip: ClipSpec | None
) -> ClipSpec:
    """The clips that the input `shape` describes; `clip` fills in what is free in it."""
    if len(shape) != _NUM_AXES:
        message = (
            f"{path} takes {_shown(shape)}, which has {len(shape)} axes; clips have five, such as "
            "NCTHW"
        )
        raise InputError(message)
    if clip is not None:
        wrong = any(
            isinstance(size, int) and size != asked
            for size, asked in zip(shape[1:], clip.input_shape, strict=True)
        )
        if wrong or (dtype == "uint8") != (clip.dtype == "uint8"):
            message = (
                f"{path} takes {dtype} of {_shown(shape)}, not {clip.dtype} clips of "
                f"{list(clip.input_shape)} ({clip.layout}); correct --input-spec"
            )
            raise InputError(message)
        return clip
    example = f"--input-spec NCTHW:{'uint8' if dtype == 'uint8' else 'float32'}:1x3x16x112x112"
    if not all(isinstance(size, int) for size in shape[1:]):
        message = (
            f"{path} takes {_shown(shape)} with free axes besides the batch; say their sizes: "
            f"{example}"
        )
        raise InputError(message)
    layouts = [
        layout for layout in ("NTCHW", "NCTHW", "NTHWC") if shape[layout.index("C")] in (1, 3)
    ]
    coloured = [layout for layout in layouts if shape[layout.index("C")] == 3]
    if len(coloured or layouts) != 1:
        message = f"{path} takes {_shown(shape)}: which axis is which? Say so: {example}"
        raise InputError(message)
    (layout,) = coloured or layouts
    size = dict(zip(layout, shape, strict=True))
    return ClipSpec(
        num_frames=size["T"], height=size["H"], width=size["W"], channels=size["C"],
        layout=layout, dtype="uint8" if dtype == "uint8" else "float32",  # type: ignore[arg-type]
        rescale=1.0 if dtype == "uint8" else 1 / 255,
    )  # fmt: skip


def _shown(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join('free' if size is None else str(size) for size in shape)}]"
