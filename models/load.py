"""`load_model`: from what a user has to a `VideoModel`.

A model is given as a `.pt` or `.safetensors` file, as a graph (`.onnx`, or a `.pt2` program of
`torch.export`), as a directory saved by transformers or by diffusers (a transformer, or a pipeline
with one), as `module:callable`, or as `reference:NAME` for the models that ship.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from vcompress.models import checkpoint as checkpoints
from vcompress.models import structure
from vcompress.models.adapters.base import Adapter, Description
from vcompress.models.adapters.frame_towers import CLIP, DINOV2, DINOV2_WITH_REGISTERS, SIGLIP
from vcompress.models.adapters.timesformer import TIMESFORMER
from vcompress.models.adapters.transformers_video import VIDEOMAE, VIVIT
from vcompress.models.adapters.videoprism import VIDEOPRISM
from vcompress.models.adapters.vjepa2 import VJEPA2
from vcompress.models.attention_linears import with_linear_attention
from vcompress.models.call_file import holds_calls, read_calls
from vcompress.models.calls import Call, as_computed
from vcompress.models.convolution_products import with_plain_convolutions
from vcompress.models.denoisers import MODEL_INDEX, example_call, only_transformer
from vcompress.models.directory import clip_from_processor, read_directory, read_processor
from vcompress.models.exportable import exportable
from vcompress.models.graphs.source import SUFFIXES, load_graph
from vcompress.models.video import Task, TokenGrid, VideoModel, weights_digest
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = [
    "ADAPTERS",
    "LoadOptions",
    "from_checkpoint",
    "load_model",
    "parse_input_spec",
    "wrap_denoiser",
    "wrap_module",
]

ADAPTERS: tuple[Adapter, ...] = (
    VIDEOMAE, VIVIT, TIMESFORMER, VJEPA2, VIDEOPRISM, CLIP, SIGLIP, DINOV2, DINOV2_WITH_REGISTERS,
)  # fmt: skip


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


def load_model(source: str, options: LoadOptions | None = None) -> VideoModel:
    """Load `source`, run it once, and describe it. `InputError` for everything that is wrong."""
    options = options or LoadOptions()
    if source.startswith("reference:"):
        from vcompress.models.reference.catalog import load_reference

        if replace(options, calls=None) != LoadOptions():
            message = f"{source} says itself how it is built and fed; leave the model flags out"
            raise InputError(message)
        return load_reference(source.removeprefix("reference:"), options.calls)
    path = Path(source)
    if path.is_dir():
        return _load_directory(path, options)
    if not path.exists() and ":" in source:
        return wrap_module(
            _call(source), name=source.partition(":")[2], options=options, source=source
        )
    if path.suffix in SUFFIXES:
        return _from_graph(path, options)
    loaded = checkpoints.read_checkpoint(path, trust_pickle=options.trust_pickle)
    return _from_checkpoint(loaded, path, options)


def _load_directory(path: Path, options: LoadOptions) -> VideoModel:
    name = path.name
    if (path / MODEL_INDEX).is_file():
        path = only_transformer(path)
    elif (path.absolute().parent / MODEL_INDEX).is_file():
        name = f"{path.absolute().parent.name}-{path.name}"
    module, family, config = read_directory(path)
    if "_class_name" in config:
        _refuse_clip_options(options, f"{path} is a {family}")
        known_config = dict(getattr(module, "config", config))
        call = example_call(family, known_config, options.calls, str(path))
        return wrap_denoiser(
            module, name=name, call=call, family=family, config=config, source=str(path)
        )
    adapter = next((adapter for adapter in ADAPTERS if adapter.family == family), None)
    if adapter is None:
        model = wrap_module(
            module, name=path.name, options=options, source=str(path), family=family,
            task="classify" if "Classification" in type(module).__name__ else None,
        )  # fmt: skip
        return replace(model, config=config)
    known: Mapping[str, Any] = config
    if adapter.adopt is not None:
        module, known = adapter.adopt(module, config, read_processor(path))
    described = adapter.describe(known)
    described = replace(described, clip=clip_from_processor(path, described.clip))
    return _finish(module, path.name, family, described, known, str(path), options)


def _from_graph(path: Path, options: LoadOptions) -> VideoModel:
    if options.arch is not None:
        message = f"{path} holds its architecture; leave --arch out"
        raise InputError(message)
    given = None if options.input_spec is None else parse_input_spec(options.input_spec)
    graph = load_graph(path, clip=given, trust_pickle=options.trust_pickle)
    task: Task = "classify" if graph.classifies else "generic"
    if graph.task in get_args(Task):
        task = cast(Task, graph.task)
    model = wrap_module(
        graph.module, name=graph.name or path.stem, options=options, source=str(path),
        family=path.suffix.removeprefix("."), task=task, labels=graph.labels, clip=graph.clip,
    )  # fmt: skip
    return replace(model, blocks=graph.blocks)


def _from_checkpoint(
    loaded: checkpoints.Checkpoint, path: Path, options: LoadOptions
) -> VideoModel:
    if loaded.module is not None:
        return wrap_module(loaded.module, name=path.stem, options=options, source=str(path))
    if options.arch is not None:
        module = _call(options.arch)
        checkpoints.load_state(module, loaded.state_dict, str(path))
        return wrap_module(
            module, name=path.stem, options=options, source=str(path), labels=loaded.labels,
            clip=None if loaded.clip is None else ClipSpec.from_dict(dict(loaded.clip)),
        )  # fmt: skip
    if not loaded.family:
        message = (
            f"{path} is a bare state dict: tensors without an architecture; add "
            "--arch module:callable, or save {'family', 'config', 'state_dict'} with family one "
            f"of: {', '.join(adapter.family for adapter in ADAPTERS)}"
        )
        raise InputError(message)
    return from_checkpoint(loaded, name=path.stem, source=str(path), options=options)


def from_checkpoint(
    loaded: checkpoints.Checkpoint, *, name: str, source: str, options: LoadOptions
) -> VideoModel:
    """Build the family that the checkpoint names and load its weights."""
    known = [adapter.family for adapter in ADAPTERS]
    if loaded.family not in known:
        message = (
            f"{source}: unknown family {loaded.family!r}; known: {', '.join(known)}"
            f"{nearest(loaded.family, known)}; or give --arch module:callable"
        )
        raise InputError(message)
    adapter = ADAPTERS[known.index(loaded.family)]
    if adapter.load is None:
        module = adapter.build(loaded.config)
        checkpoints.load_state(module, loaded.state_dict, source)
    else:
        module = adapter.load(loaded.config, loaded.state_dict, source)
    described = adapter.describe(loaded.config)
    if loaded.labels:
        described = replace(described, labels=loaded.labels)
    if loaded.clip is not None:
        described = replace(described, clip=ClipSpec.from_dict(dict(loaded.clip)))
    return _finish(module, name, loaded.family, described, loaded.config, source, options)


def _finish(
    module: nn.Module, name: str, family: str, described: Description,
    config: Mapping[str, Any], source: str, options: LoadOptions,
) -> VideoModel:  # fmt: skip
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


def _refuse_clip_options(options: LoadOptions, what: str) -> None:
    if replace(options, calls=None, trust_pickle=False, task=None) != LoadOptions():
        message = (
            f"{what}, which takes the tensors of its recorded calls and no clips; leave out the "
            "flags that say how a clip is made, and --arch"
        )
        raise InputError(message)


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
    return _finish(module, name, family, described, {}, source, options)


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


def _call(reference: str) -> nn.Module:
    """Import `module:callable` and call it without arguments."""
    module_name, _, attribute = reference.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        # Importing runs the user's file, which may fail in any way.
        message = (
            f"{reference}: {type(error).__name__}: {error}; it must be module:callable, importable "
            "from here (set PYTHONPATH if it is a file of yours)"
        )
        raise InputError(message) from error
    try:
        module = factory()
    except Exception as error:
        message = f"{reference}() failed: {type(error).__name__}: {error}"
        raise InputError(message) from error
    if not isinstance(module, nn.Module):
        message = f"{reference}() must return a torch.nn.Module, got {type(module).__name__}"
        raise InputError(message)
    return module
