"""Convolutions that are more than a product: padded by hand, or with a weight that is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import vcompress
from vcompress.calib.clips import Clips
from vcompress.compress.frozen import freeze
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session
from vcompress.models.convolution_products import with_plain_convolutions
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.structure import find_layers, run_once
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.spec.errors import InputError


class Causal(nn.Conv3d):
    """Sees no later frame, as the convolutions of Wan's autoencoder."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.pad(input, (1, 1, 1, 1, 2, 0)))


class Standardised(nn.Conv3d):
    """Its weight has the mean 0 and the variance 1, whatever is stored."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(input, weight, self.bias)


class ByItself(nn.Conv3d):
    """Calls the function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.conv3d(input, self.weight, self.bias, padding=1)


class Scaled(nn.Linear):
    """A linear layer with more to it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(input)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Causal(3, 16, 3), Causal(16, 16, 3, bias=False)
        self.standardised, self.by_itself = Standardised(16, 16, 1), ByItself(16, 16, 3)
        self.plain, self.scaled = nn.Conv3d(16, 16, 1), Scaled(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(clips).relu()).relu()
        x = self.plain(self.by_itself(self.standardised(x)).relu()).mean((2, 3, 4))
        return self.head(self.scaled(x).relu())


@pytest.fixture
def network() -> nn.Module:
    return Network().eval()


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_product_of_a_padding_class_becomes_a_layer(
    network: nn.Module, clips: torch.Tensor
) -> None:
    changed = with_plain_convolutions(network, clips)
    assert torch.equal(changed(clips), network(clips))
    layers = find_layers(changed, run_once(changed, clips))
    takes_int8 = {name: facts.objection("int8") is None for name, facts in layers.items()}
    assert takes_int8 == {
        "first.product": True, "second.product": True, "plain": True, "head": True,
        "standardised": False, "by_itself": False, "scaled": False,
    }  # fmt: skip
    assert "Standardised computes more" in str(layers["standardised"].objection("int8"))
    # The original is as it was.
    assert type(network.first) is Causal
    assert "weight" in network.first._parameters


def test_nothing_that_computes_more_is_frozen(network: nn.Module) -> None:
    for name in ("first", "standardised", "scaled"):
        with pytest.raises(InputError, match="forward of its own"):
            freeze(network.get_submodule(name), "int8", 1.0, name=name)


def test_it_is_planned_applied_and_exported(
    network: nn.Module, clips: torch.Tensor, tmp_path: Path
) -> None:
    load = LoadOptions(input_spec="NCTHW:float32:1x3x4x8x8")
    model = wrap_module(network, name="causal", options=load)
    data = np.random.default_rng(1).normal(size=(12, 3, 4, 8, 8)).astype("f4")
    options = vcompress.Options(target="int8", calib="clips", max_layer_error=0.5)
    plan, tensors = make_plan(model, Clips.from_array(data, model.clip), options)
    formats = {name: choice.format for name, choice in plan.quantize.items()}
    assert formats["first.product"] == formats["second.product"] == "int8"
    assert formats["scaled"] == formats["standardised"] == "keep"
    assert "Scaled computes more" in plan.quantize["scaled"].reason
    planned = apply_plan(model, plan, tensors)
    export_onnx(planned.module, clips, tmp_path / "m.onnx", dialect="portable")
    got = open_session(tmp_path / "m.onnx").run_named({"pixel_values": clips.numpy()})["output"]
    with torch.no_grad():
        expected, simulated = network(clips), planned.module(clips)
    assert torch.allclose(torch.from_numpy(got), simulated, atol=1e-4)
    assert (simulated - expected).norm() < 0.1 * expected.norm()
