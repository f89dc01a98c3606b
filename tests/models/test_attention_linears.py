"""Torch's multi-head attention, taken apart into layers that can be quantized."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.models.attention_linears import LinearAttention, with_linear_attention
from vcompress.models.load import LoadOptions, wrap_module

OPTIONS = LoadOptions(input_spec="NTCHW:float32:1x2x3x8x8", task="classify")


def arguments_of(batch_first: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 5, 16, generator=generator)
    key = torch.randn(2, 7, 16, generator=generator)
    value = torch.randn(2, 7, 16, generator=generator)
    if batch_first:
        return query, key, value
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3])},
    "padding that is added": {"key_padding_mask": torch.linspace(-1, 0, 14).reshape(2, 7)},
    "one mask": {"attn_mask": torch.ones(5, 7).triu(3).bool()},
    "a mask for each head": {"attn_mask": torch.linspace(-2, 2, 280).reshape(8, 5, 7)},
    "both": {
        "attn_mask": torch.ones(5, 7).triu(3).bool(),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_results_and_weights_are_those_of_torch(mask: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    for bias, average, sizes in product(
        (True, False), (True, False), ({}, {"kdim": 16, "vdim": 16})
    ):
        original = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, **sizes).eval()
        for parameter in original.parameters():
            nn.init.normal_(parameter, std=0.3)
        ours = LinearAttention(original)
        keywords = {**MASKS[mask], "average_attn_weights": average}
        expected, weights = original(*arguments_of(batch_first), **keywords)
        got, our_weights = ours(*arguments_of(batch_first), **keywords)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(our_weights, weights)
        without, nothing = ours(*arguments_of(batch_first), need_weights=False, **keywords)
        assert nothing is None
        torch.testing.assert_close(without, expected)


def test_other_widths_of_keys_and_one_sequence_without_a_batch() -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(16, 2, kdim=6, vdim=10).eval()
    inputs = torch.randn(5, 16), torch.randn(7, 6), torch.randn(7, 10)
    ours = LinearAttention(original)
    padding = torch.tensor([False] * 6 + [True])
    for keywords in ({}, {"key_padding_mask": padding}):
        expected, weights = original(*inputs, **keywords)
        got, our_weights = ours(*inputs, **keywords)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(our_weights, weights)


class Encoder(nn.Module):
    """Two layers that share one attention, and torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.again = self.attention
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.stem(clips.reshape(len(clips), -1, 48))
        x = x + self.attention(x, x, x)[0]
        x = x + self.again(x, x, x, need_weights=False)[0]
        return self.head(self.encoder(x).mean(1))


def test_every_product_of_a_hand_written_transformer_is_a_layer_of_the_plan() -> None:
    torch.manual_seed(0)
    module = Encoder().eval()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    model = wrap_module(module, name="encoder", options=OPTIONS)
    inner = [f"encoder.layers.{index}.self_attn.{part}" for index in range(3)
             for part in ("query", "key", "value", "out_proj")]  # fmt: skip
    assert set(inner) <= set(model.layers)
    assert {"attention.query", "attention.out_proj"} <= set(model.layers)
    assert model.module.get_submodule("again") is model.module.get_submodule("attention")
    assert model.blocks == tuple(f"encoder.layers.{index}" for index in range(3))
    clips = model.example(2)
    torch.testing.assert_close(model(clips), module(clips))
    # The module that was given stays as it was.
    assert isinstance(module.attention, nn.MultiheadAttention)
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_model_that_reads_the_packed_weights_itself_keeps_its_attention() -> None:
    class Reads(Encoder):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return super().forward(clips) + self.attention.in_proj_weight.mean()

    class Other(nn.MultiheadAttention):
        """Computes something else."""

    module = Reads().eval()
    assert with_linear_attention(module, torch.randn(1, 2, 3, 8, 8)) is module
    other = Encoder().eval()
    other.attention = other.again = Other(32, 4, batch_first=True).eval()
    changed = with_linear_attention(other, torch.randn(1, 2, 3, 8, 8))
    assert isinstance(changed.get_submodule("attention"), Other)
    assert isinstance(changed.get_submodule("encoder.layers.0.self_attn"), LinearAttention)
