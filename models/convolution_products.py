"""Convolutions of a class of their own, with the product as a plain convolution inside.

Video autoencoders pad the time axis by hand (`WanCausalConv3d`), others split a large input into
parts, in a subclass of `nn.Conv3d` that then goes on as its base does. As a whole such a layer is
no convolution, and taking it for one would lose what the subclass adds. Here its product becomes
a plain convolution with the same weight, `product`, which can be calibrated, planned and quantized.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from vcompress.models.calls import Batch
from vcompress.models.structure import HoldsProduct, computes_alike, is_plain, run_once

__all__ = ["with_plain_convolutions"]

_BASES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Around(HoldsProduct):
    """What is put in front of the subclass: its base's product is that of `product`."""

    product: nn.Module

    @property
    def weight(self) -> torch.Tensor | None:
        """Of the plain convolution; None once that is frozen."""
        return getattr(self.product, "weight", None)

    @property
    def bias(self) -> torch.Tensor | None:
        """See `weight`."""
        return getattr(self.product, "bias", None)

    def _conv_forward(self, input: torch.Tensor, weight: object, bias: object) -> torch.Tensor:
        del weight, bias
        result: torch.Tensor = self.product(input)
        return result


def with_plain_convolutions(module: nn.Module, example: Batch) -> nn.Module:
    """`module`, or a copy in which convolutions of an own class hold a plain one.

    Class by class, and only where every such product runs on `example` and the outputs stay what
    they are; a class that changes its weight, or multiplies by itself, is left alone.
    """
    found = {name: type(each) for name, each in module.named_modules() if _can_hold(each)}
    if not found:
        return module
    ran = run_once(module, example)
    for cls in dict.fromkeys(found.values()):
        names = [name for name in found if found[name] is cls and name in ran]
        changed = copy.deepcopy(module)
        for name in names:
            _hollow(changed.get_submodule(name))
        if not computes_alike(module, changed, example):
            continue
        if run_once(changed, example).issuperset(f"{name}.product" for name in names):
            module = changed
    return module


def _can_hold(module: Any) -> bool:
    return (
        isinstance(module, _BASES)
        and not is_plain(module)
        and module.padding_mode == "zeros"
        and {name for name, _ in module.named_parameters()} <= {"weight", "bias"}
        and "weight" in module._parameters
        and not list(module.children())
    )


def _hollow(module: Any) -> None:
    """Move the product of `module`, a convolution, into a convolution inside of it."""
    base = next(each for each in _BASES if isinstance(module, each))
    with torch.device("meta"):
        product = base(
            module.in_channels, module.out_channels, module.kernel_size, module.stride,
            module.padding, module.dilation, module.groups, module.bias is not None,
        )  # fmt: skip
    product.weight, product.bias = module.weight, module.bias
    product.train(module.training)
    del module._parameters["weight"], module._parameters["bias"]
    cls = type(module)
    module.__class__ = type(cls.__name__, (_Around, cls), {})
    module.product = product
