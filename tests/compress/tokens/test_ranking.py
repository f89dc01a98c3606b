"""Sorting beyond what one TopK of TensorRT gives back, and techniques that need it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vcompress.compress.tokens.ranking import ascending, descending
from vcompress.compress.tokens.techniques import bipartite
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session

MANY = 4000


def test_few_and_many_are_sorted() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (7, MANY):
        scores = torch.randn(2, count, generator=generator)
        order = descending(scores)
        assert torch.equal(order.sort(dim=1).values, torch.arange(count).expand(2, -1))
        assert (scores.gather(1, order).diff(dim=1) <= 0).all()
        places = torch.randperm(count, generator=generator)[None]
        assert torch.equal(ascending(places), torch.arange(count)[None])


def test_of_many_equals_the_first_comes_first() -> None:
    scores = torch.zeros(1, MANY)
    scores[0, 3990] = 1.0
    order = descending(scores)[0].tolist()
    assert order == [3990, *(place for place in range(MANY) if place != 3990)]


class Order(nn.Module):
    """The order of scores, as numbers that every runtime hands back."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return descending(scores).float()


def test_many_are_sorted_in_every_runtime(
    tmp_path: Path, builds_in_tensorrt: Callable[..., None]
) -> None:
    path, module = tmp_path / "many.onnx", Order()
    scores = torch.randn(1, MANY, generator=torch.Generator().manual_seed(1))
    # Equals, which one TopK may put in any order.
    scores[0, 10:20] = 0.5
    export_onnx(module, scores, path, dialect="portable", dynamic_batch=False)
    assert np.array_equal(open_session(path).run(scores.numpy()), module(scores).numpy())
    builds_in_tensorrt(path, also=("TopK", "ScatterElements", "ScatterND"))


def test_more_patches_are_matched_than_a_topk_gives_back() -> None:
    # Token 2 i + 1 points where token 2 i does, and nearly so to token 2 i + 3.
    angle = torch.arange(MANY) * (3.0 / MANY)
    pairs = torch.stack([angle.cos(), angle.sin()], dim=-1).repeat_interleave(2, dim=0)[None]
    matching = bipartite.match(pairs, 1000)
    merged, sizes = matching.apply(pairs, torch.ones(1, 2 * MANY))
    assert merged.shape == (1, 2 * MANY - 1000, 2)
    assert sizes.sum() == 2 * MANY
    assert torch.allclose(matching.restore(merged), pairs, atol=1e-2)
