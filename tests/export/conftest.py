"""Small models with frozen layers, and their ONNX files, each exported once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.frozen import freeze
from vcompress.export.graph import GraphFacts, export_onnx
from vcompress.spec.formats import FORMATS

SHAPE = (4, 3, 16, 16)  # T C H W
_KINDS = {nn.Linear: "linear", nn.Conv3d: "conv3d"}


class TinyVideo(nn.Module):
    """Conv3d patches, one attention block with a residual, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 64, (2, 4, 4), stride=(2, 4, 4))
        self.norm = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x.transpose(1, 2)).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(tokens)).unflatten(-1, (3, 4, 16)).unbind(2)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        tokens = tokens + self.out(functional.gelu(mixed.transpose(1, 2).flatten(-2)))
        return self.head(tokens.mean(1))


class Logits(nn.Module):
    """A transformers classifier that takes and returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).logits


def _transformers_model(name: str) -> nn.Module:
    from transformers import (
        VideoMAEConfig,
        VideoMAEForVideoClassification,
        VivitConfig,
        VivitForVideoClassification,
    )

    sizes: dict[str, Any] = {
        "image_size": 16, "num_frames": 4, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 7,
    }  # fmt: skip
    if name == "videomae":
        config = VideoMAEConfig(patch_size=8, tubelet_size=2, **sizes)
        return Logits(VideoMAEForVideoClassification(config))
    return Logits(VivitForVideoClassification(VivitConfig(tubelet_size=[2, 8, 8], **sizes)))


def freeze_all(module: nn.Module, format: str, x: torch.Tensor) -> None:
    """Freeze every layer that can take `format`, the others to INT8, calibrated on `x`.

    With "FORMAT alone" the others stay as they are.
    """
    format, _, alone = format.partition(" ")
    layers = {name: child for name, child in module.named_modules() if type(child) in _KINDS}
    amax: dict[str, float] = {}
    hooks = [
        child.register_forward_pre_hook(
            lambda _, inputs, name=name: amax.__setitem__(name, inputs[0].abs().max().item())
        )
        for name, child in layers.items()
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    for name, child in layers.items():
        refused = FORMATS[format].objection(_KINDS[type(child)], tuple(child.weight.shape))
        if not (refused and alone):
            module.set_submodule(name, freeze(child, "int8" if refused else format, amax[name]))


@dataclass(frozen=True)
class Exported:
    module: nn.Module
    facts: GraphFacts

    @property
    def path(self) -> Path:
        return self.facts.files[0]


@pytest.fixture(scope="session")
def clips() -> torch.Tensor:
    """Three inputs for all models `[B, T, C, H, W]`."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def original() -> Callable[[str], nn.Module]:
    """An unquantized model: "tiny", "videomae" or "vivit"."""
    models: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        if name not in models:
            torch.manual_seed(0)
            models[name] = (TinyVideo() if name == "tiny" else _transformers_model(name)).eval()
        return models[name]

    return get


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    original: Callable[[str], nn.Module],
    clips: torch.Tensor,
) -> Callable[[str, str, str], Exported]:
    """A model in a format ("float" leaves it alone) and its file in a dialect, made once."""
    folder = tmp_path_factory.mktemp("onnx")
    made: dict[tuple[str, str, str], Exported] = {}

    def get(name: str, format: str, dialect: str) -> Exported:
        key = (name, format, dialect)
        if key not in made:
            module = copy.deepcopy(original(name))
            if format != "float":
                freeze_all(module, format, clips)
            path = folder / f"{name}.{format}.{dialect}.onnx"
            facts = export_onnx(
                module, clips[:1], path, dialect=dialect, metadata={"task": "classify"}
            )
            made[key] = Exported(module, facts)
        return made[key]

    return get
