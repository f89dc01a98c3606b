"""Which layers receive the same tensor."""

from __future__ import annotations

import torch
from torch import nn

from vcompress.models.structure import find_shared_inputs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 1)
        self.second_conv = nn.Conv3d(3, 8, 1)
        for name in ("q", "k", "v", "cross", "out", "after"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = (self.conv(clips) + self.second_conv(clips)).flatten(2).transpose(1, 2)
        h = self.q(x) + self.k(input=x) + self.v(x)
        h = h + self.cross(h)
        h = self.out(h)
        x += h
        return self.after(x)


def groups_of(module: nn.Module, example: torch.Tensor) -> set[tuple[str, ...]]:
    names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv3d)]
    return set(find_shared_inputs(module, names, example))


def test_query_key_and_value_are_one_group() -> None:
    found = groups_of(Net(), torch.randn(1, 3, 2, 4, 4))
    # `after` gets the tensor that the queries had, with other values: it was changed in place.
    # The convolutions read the same clips, but nothing fuses them.
    assert found == {
        ("conv",), ("second_conv",), ("q", "k", "v"), ("cross",), ("out",), ("after",),
    }  # fmt: skip


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros(())
            for layer in self.layers:
                # Freed at once, so that the next one takes its place.
                total = total + layer(x + 1).sum()
            return total

    found = groups_of(Sequence(), torch.randn(2, 8))
    assert found == {(f"layers.{index}",) for index in range(8)}


def test_calls_with_several_tensors_tie_all_who_share_one() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            one = self.first(x) + self.second(y)
            return one + self.both(x) + self.both(y)

    assert groups_of(Several(), torch.randn(2, 8)) == {("first", "both", "second")}


def test_it_works_within_inference_mode_too() -> None:
    with torch.inference_mode():
        found = groups_of(Net(), torch.randn(1, 3, 2, 4, 4))
    assert ("q", "k", "v") in found
