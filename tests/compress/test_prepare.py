"""What a frozen layer is made of: stored weights and tensors that fit, and those that do not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.compress.frozen import FrozenLayer, freeze
from vcompress.compress.numerics import mxfp8
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS

K = 128


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def frozen(layer: nn.Module, format: str, amax: float = 4.0, **options: Any) -> FrozenLayer:
    result = freeze(layer, format, amax, **options)
    assert isinstance(result, FrozenLayer)
    return result


def everything(num_inputs: int, num_outputs: int) -> dict[str, torch.Tensor]:
    return {
        "input_smoothing": torch.rand(num_inputs) + 0.5,
        "low_rank_down": torch.randn(4, num_inputs) / 8,
        "low_rank_up": torch.randn(num_outputs, 4) / 8,
        "bias": torch.randn(num_outputs),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_a_stored_weight_is_taken_as_it_is(format: str) -> None:
    layer, tensors = nn.Linear(K, 24), everything(K, 24)
    donor = copy.deepcopy(layer)
    donor.weight.data += 0.01 * torch.randn(24, K)
    stored = frozen(donor, format, rotation=16, tensors=tensors).stored_weight
    result = frozen(layer, format, rotation=16, tensors={**tensors, **stored})
    assert result.stored_weight.keys() == stored.keys()
    for name, buffer in result.stored_weight.items():
        assert torch.equal(buffer.float(), stored[name].float())
    # A copy: what happens to the layer does not happen to the tensors.
    assert result.stored_weight.keys().isdisjoint(tensors)
    next(iter(result.stored_weight.values())).zero_()
    assert bool(next(iter(stored.values())).float().any())


def test_e8m0_scales_may_be_given_in_their_own_type() -> None:
    layer = nn.Linear(K, 24)
    weight = mxfp8.quantize_weight(layer.weight)
    assert weight.block_scale.dtype == torch.float8_e8m0fnu
    tensors = {"weight_quantized": weight.codes, "weight_block_scale": weight.block_scale}
    x = torch.randn(3, K)
    assert torch.equal(frozen(layer, "mxfp8", tensors=tensors)(x), frozen(layer, "mxfp8")(x))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_stored_weight_of_another_format(format: str, other: str) -> None:
    layer = nn.Linear(K, 24)
    stored = frozen(layer, other).stored_weight
    alike = [{"int8", "int8_token"}]
    if format == other or {format, other} in alike:
        frozen(layer, format, tensors=stored)
        return
    with pytest.raises(InputError, match=rf"the stored weight has weight_.*, {format} stores this"):
        frozen(layer, format, tensors=stored)


def test_a_stored_weight_of_another_layer_or_rotation() -> None:
    layer = nn.Linear(K, 24)
    others = {
        "layer": frozen(nn.Linear(K, 24), "nvfp4").stored_weight,
        "rotation": frozen(layer, "nvfp4", rotation=32).stored_weight,
        "shape": frozen(nn.Linear(K, 16), "nvfp4").stored_weight,
    }
    for name, stored in others.items():
        problem = "has weight_block_scale" if name == "shape" else "is not that of this layer"
        with pytest.raises(InputError, match=problem):
            frozen(layer, "nvfp4", tensors=stored)
    frozen(layer, "nvfp4", rotation=32, tensors=others["rotation"])


@pytest.mark.parametrize(
    ("layer", "options", "problem"),
    [
        (nn.Linear(96, 8), {"rotation": 64}, "rotation 64 must divide the last axis, which has 96"),
        (nn.Linear(96, 8), {"rotation": 12}, "a power of two as its size, got 12"),
        (nn.Conv2d(32, 8, 1), {"rotation": 16}, "a rotation is defined for linear layers"),
        (nn.Linear(32, 8), {"low_rank_up": torch.ones(8, 2)}, "needs both low_rank_down and"),
        (
            nn.Linear(32, 8),
            {"low_rank_up": torch.ones(8, 2), "low_rank_down": torch.ones(3, 32)},
            r"\[R, K\] and \[N, R\] of a linear layer",
        ),
        (
            nn.Conv2d(32, 8, 1),
            {"low_rank_up": torch.ones(8, 2), "low_rank_down": torch.ones(2, 32)},
            r"\[R, K\] and \[N, R\] of a linear layer",
        ),
        (
            nn.Linear(32, 8),
            {"low_rank_up": torch.full((8, 1), math.nan), "low_rank_down": torch.ones(1, 32)},
            "low_rank_up must be floating-point and finite",
        ),
        (nn.Linear(32, 8), {"bias": torch.ones(7)}, "one value for each of the 8 output channels"),
        (nn.Linear(32, 8), {"bias": torch.full((8,), math.inf)}, "bias must be .* finite"),
        (nn.Linear(32, 8), {"smoothing": torch.ones(32)}, "unknown tensors smoothing"),
    ],
)
def test_what_does_not_fit(layer: nn.Module, options: dict[str, Any], problem: str) -> None:
    rotation = options.pop("rotation", None)
    with pytest.raises(InputError, match=problem):
        freeze(layer, "int8", 1.0, rotation=rotation, tensors=options)
