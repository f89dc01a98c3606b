"""What a folder of diffusers holds, from its configurations alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcompress.models.calls import call_of
from vcompress.models.denoisers import EXAMPLES, MODEL_INDEX, transformers_of
from vcompress.models.empty import empty_module
from vcompress.models.structure import find_blocks, find_layers
from vcompress.spec import strict_json
from vcompress.spec.errors import InputError

__all__ = ["FoundModel", "look"]


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model in a folder.

    Attributes:
        path: of its folder.
        family: its class in diffusers.
        num_parameters: of all kinds.
        layers: how many it has of each kind that can be quantized.
        blocks: full names of the repeated blocks.
        inputs: the tensors that it takes, where the class is known; else how to tell.
    """

    path: str
    family: str
    num_parameters: int
    layers: Mapping[str, int]
    blocks: tuple[str, ...]
    inputs: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "layers": dict(self.layers), "blocks": list(self.blocks)}


def look(path: Path) -> tuple[FoundModel, ...]:
    """The transformers of the pipeline folder `path`, or the one in the model folder `path`.

    Raises:
        InputError: neither of them, or a configuration that makes no model.
        MissingCapabilityError: diffusers is not installed.
    """
    folders = [path]
    if (path / MODEL_INDEX).is_file():
        folders = [path / name for name in transformers_of(path)]
        if not folders:
            message = f"{path} is a pipeline without a transformer; there is nothing to compress"
            raise InputError(message)
    return tuple(_found(folder) for folder in folders)


def _found(folder: Path) -> FoundModel:
    file = folder / "config.json"
    config = strict_json.read(file) if file.is_file() else None
    if not isinstance(config, dict) or "_class_name" not in config:
        message = (
            f"{folder} is neither an artifact nor a folder of a model or pipeline of diffusers: it "
            "has no config.json with _class_name"
        )
        raise InputError(message)
    module = empty_module(config)
    family = type(module).__name__
    layers = find_layers(module, {name for name, _ in module.named_modules()})
    known: Mapping[str, Any] = dict(getattr(module, "config", config))
    inputs = "found from recorded calls: see vcompress.record_calls"
    if family in EXAMPLES:
        inputs = ", ".join(call_of(EXAMPLES[family](known)).flat)
    return FoundModel(
        path=str(folder),
        family=family,
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=dict(Counter(facts.kind for facts in layers.values())),
        blocks=find_blocks(module, layers),
        inputs=inputs,
    )
