"""Attention in eight bits: by hand, against exact attention, in a model and out of it again."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress import attention_products
from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.attention_sites import (
    apply_attention,
    attention_applied,
    exact_attention,
    find_attentions,
    products_of,
)
from vcompress.models.video import VideoModel
from vcompress.spec.attention_section import PRODUCT_FORMATS, AttentionChoice
from vcompress.spec.errors import InputError

FORMATS = tuple(PRODUCT_FORMATS)


def operands(num_tokens: int = 48, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, num_tokens, width)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def choice_for(
    format_name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    smooth: bool = False,
) -> AttentionChoice:  # fmt: skip
    smoothed = key - key.mean(-2, keepdim=True) if smooth else key
    return AttentionChoice(
        format=format_name, reason="", query_amax=float(query.abs().amax()),
        key_amax=float(smoothed.abs().amax()), value_amax=float(value.abs().amax()),
        smooth_keys=smooth,
    )  # fmt: skip


def error_of(output: torch.Tensor, exact: torch.Tensor) -> float:
    return float((output - exact).norm() / exact.norm())


def test_int8_by_hand() -> None:
    # Ranges of 127, so that scales are 1: integers go through as they are.
    query, key = torch.tensor([[[[2.0], [0.0]]]]), torch.tensor([[[[1.2], [0.0]]]])
    value = torch.tensor([[[[10.0], [20.4]]]])
    choice = AttentionChoice(
        format="int8", reason="", query_amax=127.0, key_amax=127.0, value_amax=127.0
    )
    output = AttentionProducts(choice)(query, key, value, scale=1.0)
    # Keys round to 1 and 0, values to 10 and 20; scores of the first query are 2 and 0.
    small = math.exp(-2)
    rounded = round((small - 0.5) / (0.5 / 127)) * (0.5 / 127) + 0.5
    first = (10 + 20 * rounded) / (1 + small)
    assert output.flatten().tolist() == pytest.approx([first, 15.0], rel=1e-6)


def test_fp8_divides_by_what_was_rounded() -> None:
    """All probabilities of a flat row are rounded alike, which must not change the mean."""
    query, key, value = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 7, 4), torch.ones(1, 1, 7, 4)
    # One score is higher, so that the others are no round number.
    query[..., 0], key[..., 3, 0] = 1.0, 0.5
    output = AttentionProducts(choice_for("fp8", query, key, value))(query, key, value)
    assert torch.allclose(output, torch.ones_like(output), atol=1e-6)


@pytest.mark.parametrize("format_name", FORMATS)
def test_it_is_close_to_exact_attention(format_name: str) -> None:
    query, key, value = operands()
    exact = functional.scaled_dot_product_attention(query, key, value)
    for smooth in (False, True):
        products = AttentionProducts(choice_for(format_name, query, key, value, smooth=smooth))
        assert 1e-4 < error_of(products(query, key, value), exact) < 0.06


def test_smoothing_saves_keys_with_a_constant_channel() -> None:
    query, key, value = operands()
    key[..., 3] += 200.0
    exact = functional.scaled_dot_product_attention(query, key, value)
    errors = [
        error_of(
            AttentionProducts(choice_for("int8", query, key, value, smooth=smooth))(
                query, key, value
            ),
            exact,
        )
        for smooth in (False, True)
    ]
    assert errors[1] < 0.03 < 0.3 < errors[0]


@pytest.mark.parametrize("format_name", FORMATS)
def test_masks_causality_scale_and_grouped_keys_mean_what_they_mean_in_torch(
    format_name: str,
) -> None:
    query, key, value = operands()
    products = AttentionProducts(choice_for(format_name, query, key, value, smooth=True))
    allowed = torch.rand(48, 48, generator=torch.Generator().manual_seed(1)) > 0.3
    for keywords in (
        {"attn_mask": allowed},
        {"attn_mask": torch.where(allowed, 0.0, -1e4)[None, None]},
        {"is_causal": True},
        {"scale": 0.5},
    ):
        exact = functional.scaled_dot_product_attention(query, key, value, **keywords)
        assert error_of(products(query, key, value, **keywords), exact) < 0.08
    grouped = functional.scaled_dot_product_attention(
        query, key[:, :1], value[:, :1], enable_gqa=True
    )
    assert error_of(products(query, key[:, :1], value[:, :1], enable_gqa=True), grouped) < 0.08


def test_many_tokens_are_taken_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands()
    allowed = torch.rand(48, 48, generator=torch.Generator().manual_seed(1)) > 0.3
    products = AttentionProducts(choice_for("int8", query, key, value))
    whole = products(query, key, value, allowed)
    monkeypatch.setattr(attention_products, "_MAX_SCORES", 6 * 48 * 5)
    assert torch.allclose(products(query, key, value, allowed), whole, atol=1e-6)


def test_half_precision_stays_half_and_scales_stay_float32() -> None:
    query, key, value = (each.half() for each in operands())
    products = AttentionProducts(choice_for("fp8", query, key, value)).half()
    assert products.query_scale.dtype == torch.float32
    assert products(query, key, value).dtype == torch.float16
    assert not products.state_dict()


def test_training_is_refused() -> None:
    query, key, value = operands()
    products = AttentionProducts(choice_for("fp8", query, key, value))
    with pytest.raises(InputError, match=r"dropout_p=0.1"):
        products(query, key, value, dropout_p=0.1)


class Outer(nn.Module):
    """Attends itself, and has a part that attends too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.other = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(functional.scaled_dot_product_attention(x, x, self.other(x)))


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query=x, key=x, value=x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outer = Outer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x)


def model_and_input() -> tuple[Model, torch.Tensor]:
    return Model().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


LINE = AttentionChoice(format="int8", reason="", query_amax=4.0, key_amax=4.0, value_amax=4.0)
KEPT = AttentionChoice(format="keep", reason="")


def test_attentions_are_found_by_running(transformer: VideoModel) -> None:
    model, x = model_and_input()
    found = find_attentions(model, x)
    assert list(found) == ["outer", "outer.inner"]
    (call,) = found["outer"]
    assert (call.num_rows, call.num_queries, call.num_keys, call.width) == (2, 5, 5, 8)
    names = list(find_attentions(transformer.module, transformer.example(1)))
    assert names == list(transformer.blocks)


def test_only_the_named_attention_changes() -> None:
    model, x = model_and_input()
    exact = model(x)
    first = copy.deepcopy(model)
    apply_attention(first, {"outer": LINE, "outer.inner": KEPT})
    middle = AttentionProducts(LINE)(x, x, model.outer.other(x))
    assert torch.equal(first(x), model.outer.inner(middle))
    second = copy.deepcopy(model)
    apply_attention(second, {"outer": KEPT, "outer.inner": LINE})
    outer = functional.scaled_dot_product_attention(x, x, model.outer.other(x))
    assert torch.equal(second(x), AttentionProducts(LINE)(outer, outer, outer))
    assert torch.equal(model(x), exact)


def test_what_is_quantized_is_found_again_copied_and_undone() -> None:
    model, x = model_and_input()
    exact, sizes = model(x), find_attentions(model, x)
    lines = {"outer": LINE, "outer.inner": LINE}
    with attention_applied(model, lines):
        changed = model(x)
        assert set(products_of(model)) == {"outer", "outer.inner"}
        assert find_attentions(model, x) == sizes
        copied = copy.deepcopy(model)
        with exact_attention(model):
            assert torch.equal(model(x), exact)
        assert torch.equal(model(x), changed)
    assert torch.equal(model(x), exact)
    assert not products_of(model)
    assert list(model.outer._modules) == ["inner", "other"]
    assert torch.equal(copied(x), changed)
    assert not torch.equal(changed, exact)


def test_gradients_pass_where_attention_is_exact_for_a_while() -> None:
    model, x = model_and_input()
    apply_attention(model, {"outer": LINE, "outer.inner": LINE})
    x.requires_grad_(True)
    with exact_attention(model):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert bool(gradient.any())


def test_eager_attention_of_transformers_is_changed_to_the_form_that_is_seen() -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=16, patch_size=8, num_channels=1, num_frames=4, hidden_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = VideoMAEForVideoClassification(config).eval()
    x = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = model(x).logits
    (name,) = find_attentions(model, x)
    assert model.config._attn_implementation == "eager"
    apply_attention(model, {name: LINE})
    changed = model(x).logits
    assert not torch.equal(changed, exact)
    assert torch.allclose(changed, exact, atol=0.05)
