"""State as inputs and outputs: an exported graph decides as the live cache does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.compress.cache.catalog import build_policy
from vcompress.compress.cache.pure import cached_step

FREE: dict[str, Any] = {"num_steps": 9, "protect_first": 0, "protect_last": 1}
AMOUNTS = [1, 1.05, 1.1, 1.3, 1.31, 1.32, 2, 2, 2]


class Graph(nn.Module):
    """All blocks of the denoiser by hand, whose amounts come with the input."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, latent: torch.Tensor, amount: torch.Tensor, step: torch.Tensor, state: Any, kept: Any
    ) -> Any:
        value = {"input": latent, "modulated": amount.expand(1, 2, 4).clone()}.get(
            self.policy.signal
        )
        return cached_step(
            self.policy, lambda x: x + 3 * amount, state, kept, value, latent, step
        )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("magcache", {"threshold": 0.25, "magnitudes": (1, 1.1, 1.1, 1, 1, 0.9, 1, 1, 1)}),
        ("teacache", {"threshold": 0.2}),
        ("easycache", {"threshold": 0.3}),
        ("taylorseer", {"interval": 3, "order": 2}),
        (
            "forecast",
            {
                "compute_steps": (0, 1, 3, 5, 8),
                "mixture": ((), (), (2, -1), (), (1.5, 0, -0.5), (), (1,), (2, -1), ()),
            },
        ),
    ],
)
def test_a_graph_with_its_state_outside_follows_the_live_cache(
    ramp: Any, policy: str, settings: dict[str, Any]
) -> None:
    section = CacheSection(policy=policy, **FREE, **settings)
    module = ramp(AMOUNTS)
    cached = apply_cache(module, section)
    graph = Graph(build_policy(section, 9))

    latents = [torch.full((1, 2, 4), 10.0 + step / 2) for step in range(9)]
    signal = latents[0] if graph.policy.signal in ("input", "modulated") else None
    state = graph.policy.start(signal)
    kept = graph.policy.blank(latents[0], latents[0])
    inputs = (latents[0], torch.tensor(1.0), torch.tensor(0), state, kept)
    exported = torch.export.export(graph, inputs).module()
    for step, latent in enumerate(latents):
        with torch.no_grad():
            expected = module(latent, torch.tensor(1000.0 - step))
            after, state, kept = exported(
                latent, torch.tensor(float(AMOUNTS[step])), torch.tensor(step), state, kept
            )
        assert torch.allclose(after, expected, atol=1e-5), step
    assert 0 < cached.report().skip_rate < 1
