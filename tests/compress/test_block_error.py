"""Putting frozen layers in the place of others."""

from __future__ import annotations

import torch
from torch import nn

from vcompress.compress.block_error import replaced, replaced_all


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.one, nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](self.one(x)))


def test_a_layer_in_several_places_is_replaced_in_all_and_comes_back() -> None:
    net = Net()
    original, other = net.one, nn.Identity()
    with replaced(net, "one", other):
        assert net.one is net.blocks[0] is other
    assert net.one is net.blocks[0] is original
    with replaced_all(net, {"one": other, "blocks.1": nn.Identity()}):
        x = torch.ones(1, 4)
        assert torch.equal(net(x), x)
    assert net.one is net.blocks[0] is original
    assert isinstance(net.blocks[1], nn.Linear)


def test_an_error_puts_the_layer_back() -> None:
    net = Net()
    original = net.one
    try:
        with replaced(net, "one", nn.Linear(3, 3)):
            net(torch.ones(1, 4))
    except RuntimeError:
        pass
    assert net.one is net.blocks[0] is original
