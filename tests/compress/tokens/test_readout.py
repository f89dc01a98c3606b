"""Refitting the classifier: exact where a linear map can undo it, and only where it helps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vcompress.compress.losses import TaskLoss
from vcompress.compress.tokens.readout import (
    BIAS,
    WEIGHT,
    Features,
    apply_readout,
    cross_fitted,
    fit_readout,
    readout_of,
)
from vcompress.models.load import LoadOptions, load_model, wrap_module
from vcompress.spec.errors import InputError

LOSS = TaskLoss("kl_nats")


def data(num_clips: int) -> tuple[torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return torch.randn(num_clips, 6, generator=generator), layer


def test_a_scaled_and_shifted_feature_is_undone() -> None:
    original, layer = data(200)
    references = layer(original).detach()
    # Every feature doubled and shifted by 3: half the weights and another bias undo it.
    reduced = 2 * original + 3
    tensors = fit_readout(Features(reduced, layer(reduced).detach()), references, layer, LOSS)
    assert tensors is not None
    assert torch.allclose(reduced @ tensors[WEIGHT].T + tensors[BIAS], references, atol=0.02)


def test_nothing_to_undo_is_left_alone() -> None:
    original, layer = data(200)
    references = layer(original).detach()
    assert fit_readout(Features(original, references), references, layer, LOSS) is None


def test_noise_is_not_fitted() -> None:
    original, layer = data(40)
    references = layer(original).detach()
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    # Features that say nothing: other folds tell that a fit to them is no better than the mean.
    fitted = cross_fitted(Features(noise, layer(noise)), references, layer.weight.detach(), 1e-3)
    assert float(LOSS.values(references, fitted).mean()) > 0.1


def test_each_output_comes_from_other_clips() -> None:
    original, layer = data(16)
    references = layer(original).detach()
    changed = references.clone()
    changed[0] += 100
    features = Features(original, references)
    first = cross_fitted(features, references, layer.weight.detach(), 1.0)
    second = cross_fitted(features, changed, layer.weight.detach(), 1.0)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_the_readout_is_found_and_replaced() -> None:
    model = load_model("reference:penvideo20")
    assert readout_of(model) == "classifier"
    planned = model.copy()
    weight = torch.zeros(20, 128)
    apply_readout(planned, "classifier", {WEIGHT: weight, BIAS: torch.arange(20.0)})
    assert torch.equal(planned(model.example(2)), torch.arange(20.0).expand(2, 20))
    with pytest.raises(InputError, match="no weights that fit classifier; set it to null"):
        apply_readout(planned, "classifier", {WEIGHT: weight.T, BIAS: torch.arange(20.0)})


def test_models_that_do_not_classify_have_none() -> None:
    model = wrap_module(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 4 * 4, 5)), name="plain",
        options=LoadOptions(input_spec="NCTHW:float32:1x3x2x4x4", task="embed"),
    )  # fmt: skip
    assert readout_of(model) is None
