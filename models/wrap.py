"""From a module to a `VideoModel`: its input said, its layers and blocks found by running it once.

The names here are those of `models.load`, which is where they are imported from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vcompress.models import checkpoint as checkpoints
from vcompress.models import structure
from vcompress.models.adapters.base import Description
from vcompress.models.attention_linears import with_linear_attention
from vcompress.models.call_file import holds_calls, read_calls
from vcompress.models.calls import Call, as_computed
from vcompress.models.convolution_products import with_plain_convolutions
from vcompress.models.exportable import exportable
from vcompress.models.video import Task, TokenGrid, VideoModel, weights_digest
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

__all__ = ["LoadOptions", "parse_input_spec", "wrap_denoiser", "wrap_described", "wrap_module"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a user may have to add to the model's own words.

    Attributes:
        arch: `module:callable` that builds the architecture of a bare state dict.
        input_spec: the model's input, such as `NCTHW:float32:1x3x16x112x112`.
        trust_pickle: open whole pickled modules, and `.pt2` files. Runs code from the file.
        clip_stride, fps: how frames are taken from a video, where the model's file does not say.
        mean, std: of the normalisation after scaling to 0..1, one value or one a channel.
        task: what the output of a model means that no adapter knows.
        calls: a file of recorded calls of a model that takes several tensors; the first is run to
            find its structure. Models of clips do not look at it.
    """

    arch: str | None = None
    input_spec: str | None = None
    trust_pickle: bool = False
    clip_stride: int | None = None
    fps: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    task: Task | None = None
    calls: Path | None = None

    def __post_init__(self) -> None:
        if self.calls is not None:
            object.__setattr__(self, "calls", Path(self.calls))


def wrap_module(
    module: nn.Module, *, name: str, options: LoadOptions, source: str = "",
    family: str = "generic", task: Task | None = None, labels: tuple[str, ...] = (),
    clip: ClipSpec | None = None,
) -> VideoModel:  # fmt: skip
    """A `VideoModel` around any module; its structure is found by running it.

    Args:
        labels, clip: what the checkpoint says; `options.input_spec` goes before `clip`.
    """
    if options.input_spec is not None:
        clip = parse_input_spec(options.input_spec)
    if clip is None and options.calls is not None and holds_calls(options.calls):
        recorded = read_calls(options.calls)
        call = as_computed(recorded.calls[0].call[:1])
        return wrap_denoiser(module, name=name, call=call, family=family, source=source)
    if clip is None:
        message = (
            f"{name}: no adapter knows this model, so its input must be said: "
            "--input-spec LAYOUT:TYPE:SIZES, for instance NCTHW:float32:1x3x16x112x112"
        )
        raise InputError(message)
    described = Description(
        task=options.task or task or ("classify" if labels else "generic"),
        clip=clip,
        token_grid=None,
        labels=labels,
    )
    return wrap_described(module, name, family, described, {}, source, options)


def wrap_denoiser(
    module: nn.Module, *, name: str, call: Call, family: str = "generic",
    config: Mapping[str, Any] | None = None, source: str = "",
) -> VideoModel:  # fmt: skip
    """A `VideoModel` around a module that takes several tensors; its structure is found by a call.

    Args:
        call: of one sample, with floating-point tensors in float32.
        config: of the diffusers class `family`, from which a compressed copy can be built.

    Raises:
        InputError: the module does not run on the call, or has weights that are not finite.
    """
    module = structure.without_fused_encoders(module.float().eval().requires_grad_(False))
    module = exportable(module)
    checkpoints.check_finite(module, source or name)
    return _examined(
        VideoModel(
            name=name, module=module, family=family, task="denoise", inputs=call.spec, layers={},
            blocks=(), config=dict(config or {}), source=source, call=call,
            weights_sha256=weights_digest(module),
        )
    )  # fmt: skip


def wrap_described(
    module: nn.Module, name: str, family: str, described: Description,
    config: Mapping[str, Any], source: str, options: LoadOptions,
) -> VideoModel:  # fmt: skip
    """A `VideoModel` around a module that an adapter describes; `options` go before its words."""
    clip = described.clip
    if options.input_spec is not None:
        clip = parse_input_spec(options.input_spec)
    if options.clip_stride is not None:
        clip = replace(clip, stride=options.clip_stride)
    if options.fps is not None:
        clip = replace(clip, fps=options.fps)
    if options.mean is not None:
        clip = replace(clip, mean=options.mean)
    if options.std is not None:
        clip = replace(clip, std=options.std)
    # A checkpoint of half precision is the same model: float32 is what clips, scales and the
    # baseline are in.
    module = structure.without_fused_encoders(module.float().eval().requires_grad_(False))
    checkpoints.check_finite(module, source or name)
    model = VideoModel(
        name=name, module=module, family=family, task=described.task, inputs=clip, layers={},
        blocks=(), token_grid=_grid_of(described, clip), pooling=described.pooling,
        labels=described.labels, config=dict(config), source=source,
        weights_sha256=weights_digest(module),
    )  # fmt: skip
    return _examined(model)


def _examined(model: VideoModel) -> VideoModel:
    """`model` with its layers and blocks, found by running it once."""
    module = with_linear_attention(model.module, model.example())
    if "_class_name" not in model.config:
        # What belongs to a pipeline of diffusers goes back there, by the names that it has.
        module = with_plain_convolutions(module, model.example())
    layers = structure.find_layers(module, structure.run_once(module, model.example()))
    if not layers:
        where = model.source or model.name
        message = f"{where}: no linear or convolution ran, so there is nothing to quantize"
        raise InputError(message)
    blocks = structure.find_blocks(module, layers)
    return replace(model, module=module, layers=layers, blocks=blocks)


def _grid_of(described: Description, clip: ClipSpec) -> TokenGrid | None:
    """The grid of clips that a flag or a checkpoint may have resized; None if it is unclear."""
    grid, known = described.token_grid, described.clip
    if grid is None:
        return None
    cells = []
    for count, before, now in (
        (grid.frames, known.num_frames, clip.num_frames),
        (grid.height, known.height, clip.height),
        (grid.width, known.width, clip.width),
    ):
        # What is left over at the edge hides how large a patch is.
        if before != now and (before % count or now < before // count):
            return None
        cells.append(count if before == now else now // (before // count))
    return replace(grid, frames=cells[0], height=cells[1], width=cells[2])


def parse_input_spec(text: str) -> ClipSpec:
    """Parse `LAYOUT:TYPE:SIZES`, for instance `NTHWC:uint8:1x100x27x48x3`."""
    layout, _, rest = text.partition(":")
    dtype, _, sizes = rest.partition(":")
    numbers = sizes.lower().split("x")
    if (
        sorted(layout) != sorted("NTCHW")
        or dtype not in ("float32", "uint8")
        or len(numbers) != 5
        or not all(number.isdecimal() for number in numbers)
    ):
        message = (
            f"--input-spec must be LAYOUT:TYPE:SIZES with layout NTCHW, NCTHW or NTHWC, type "
            f"float32 or uint8 and five sizes, such as NCTHW:float32:1x3x16x112x112; got {text!r}"
        )
        raise InputError(message)
    size = dict(zip(layout, (int(number) for number in numbers), strict=True))
    return ClipSpec(
        num_frames=size["T"], height=size["H"], width=size["W"], channels=size["C"],
        layout=layout, dtype=dtype,  # type: ignore[arg-type]
        rescale=1.0 if dtype == "uint8" else 1 / 255,
    )  # fmt: skip
