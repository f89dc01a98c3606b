"""Sums by group against one-hot products, groups of any size, in torch and in every runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.tokens import reduction
from vcompress.compress.tokens.groups import Groups
from vcompress.compress.tokens.techniques import bipartite
from vcompress.export.graph import export_onnx
from vcompress.export.runtime import open_session


@pytest.mark.parametrize(
    ("num_rows", "num_groups"), [(1, 1), (1, 5), (2, 1), (40, 1), (37, 3), (50, 200), (100, 30)]
)
def test_sums_are_those_of_one_hot_products(num_rows: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(num_groups, (2, num_rows), generator=generator)
    rows = torch.randn(2, num_rows, 6, generator=generator)
    weights = torch.rand(2, num_rows, generator=generator)
    joins = functional.one_hot(group, num_groups).transpose(1, 2).float()
    found = Groups.of(group, num_groups).sums(rows, weights)
    assert torch.allclose(found, joins @ (rows * weights[..., None]), atol=1e-5)
    # Exactly nothing, so that what nothing joins keeps every bit.
    assert not found[joins.sum(-1) == 0].any()


@pytest.mark.parametrize("share", [1.0, "drawn"])
@pytest.mark.parametrize("num_receivers", [1, 30, 300])
def test_many_sources_say_the_same_as_few(
    monkeypatch: pytest.MonkeyPatch, share: float | str, num_receivers: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(600, generator=generator) for _ in range(2)])
    merges = reduction.MANY_SOURCES
    part = share if isinstance(share, float) else torch.rand(2, merges, generator=generator)
    many = reduction.Reduction(
        kept=order[:, merges:], source=order[:, :merges], num_receivers=num_receivers,
        target=torch.randint(num_receivers, (2, merges), generator=generator),
        value_share=part, size_share=part,
    )  # fmt: skip
    tokens = torch.randn(2, 600, 8, generator=generator)
    sizes = 3 * torch.rand(2, 600, generator=generator) + 1
    merged, grown = many.apply(tokens, sizes)
    monkeypatch.setattr(reduction, "MANY_SOURCES", 601)
    expected, sized = many.apply(tokens, sizes)
    assert torch.allclose(merged, expected, atol=1e-6)
    assert torch.allclose(grown, sized, rtol=1e-5)
    untouched = replace(many, value_share=0.0, size_share=0.0).apply(tokens, sizes)[0]
    is_alone = (untouched == expected).all(-1)
    assert torch.equal(merged[is_alone], untouched[is_alone])


class _Half(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, N, C]` to `[B, N/2, C + 1]`, sizes last."""
        sizes = 1 + tokens[..., 0].abs()
        merged, grown = bipartite.match(tokens, tokens.shape[1] // 2).apply(tokens, sizes)
        return torch.cat([merged, grown[..., None]], dim=-1)


def test_half_of_many_tokens_export_match_and_build(
    tmp_path: Path, builds_in_tensorrt: Callable[..., None]
) -> None:
    path, num_tokens = tmp_path / "half.onnx", 2 * reduction.MANY_SOURCES
    facts = export_onnx(_Half(), torch.randn(2, num_tokens, 8), path, dialect="portable")
    assert facts.static_reason is None
    session = open_session(path)
    for batch in (1, 3):
        tokens = torch.randn(batch, num_tokens, 8, generator=torch.Generator().manual_seed(batch))
        assert np.allclose(session.run(tokens.numpy()), _Half()(tokens).numpy(), atol=1e-5)
    builds_in_tensorrt(path)
