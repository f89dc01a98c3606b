"""`load_model`: from what a user has to a `VideoModel`.

A model is given as a `.pt` or `.safetensors` file, as a graph (`.onnx`, or a `.pt2` program of
`torch.export`), as a directory saved by transformers or by diffusers (a transformer, or a pipeline
with one), as `module:callable`, or as `reference:NAME` for the models that ship.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn

from vcompress.models import checkpoint as checkpoints
from vcompress.models.adapters.base import Adapter
from vcompress.models.adapters.frame_towers import CLIP, DINOV2, DINOV2_WITH_REGISTERS, SIGLIP
from vcompress.models.adapters.timesformer import TIMESFORMER
from vcompress.models.adapters.transformers_video import VIDEOMAE, VIVIT
from vcompress.models.adapters.videoprism import VIDEOPRISM
from vcompress.models.adapters.vjepa2 import VJEPA2
from vcompress.models.denoisers import MODEL_INDEX, example_call, only_transformer
from vcompress.models.directory import clip_from_processor, read_directory, read_processor
from vcompress.models.graphs.source import SUFFIXES, load_graph
from vcompress.models.video import Task, VideoModel
from vcompress.models.wrap import (
    LoadOptions,
    parse_input_spec,
    wrap_denoiser,
    wrap_described,
    wrap_module,
)
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
    return wrap_described(module, path.name, family, described, known, str(path), options)


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
    return wrap_described(module, name, loaded.family, described, loaded.config, source, options)


def _refuse_clip_options(options: LoadOptions, what: str) -> None:
    if replace(options, calls=None, trust_pickle=False, task=None) != LoadOptions():
        message = (
            f"{what}, which takes the tensors of its recorded calls and no clips; leave out the "
            "flags that say how a clip is made, and --arch"
        )
        raise InputError(message)


def _call(reference: str) -> nn.Module:
    """Import `module:callable` and call it without arguments; files of this folder come last."""
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        # At the end: a file that happens to be called like a library does not take its place.
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        # Importing runs the user's file, which may fail in any way.
        message = (
            f"{reference}: {type(error).__name__}: {error}; it must be module:callable, importable "
            "or a file of this folder (set PYTHONPATH if it is one of another)"
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
