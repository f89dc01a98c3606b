"""Does a block's volatility predict what quantizing its layers costs, from step to step?

6Bit-Diffusion (arXiv:2603.18742) chooses the precision of a layer's input in step t by a line
E = alpha * V + beta, fitted for each layer, where V = |y - x| / |x| (means of absolute values) is
the volatility of its block in step t - 1: what the block made of x. This module measures V and E
and fits the line; E is the relative L2 error of the layer's output with weight and input in NVFP4.
The paper does not say how well the line fits, so the correlation comes with it. The product decides
by lines of whole blocks instead (`compress.dynamic`). Difference from the paper: no Hadamard
transform in front of quantization.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vcompress.compress.cache.policies.base import relative_l1
from vcompress.compress.dynamic.lines import Line, fit_line
from vcompress.compress.numerics import nvfp4

__all__ = ["Measured", "fit_lines", "measure"]

_LEAST_POINTS = 4


@dataclass
class Measured:
    """Of one branch of one generation, a value a step.

    Attributes:
        volatility: by block.
        error: by layer, full names.
        block_of: the block of each layer.
    """

    volatility: dict[str, list[float]] = field(default_factory=dict)
    error: dict[str, list[float]] = field(default_factory=dict)
    block_of: dict[str, str] = field(default_factory=dict)


@contextmanager
def measure(
    module: nn.Module, blocks: Sequence[str], *, every_nth_call: int = 1
) -> Iterator[Measured]:
    """Measure every call of `module` inside, or one of so many where guidance calls it twice."""
    found = Measured()
    calls = [-1]
    handles = [module.register_forward_pre_hook(partial(_count, calls))]

    def is_on() -> bool:
        return calls[0] % every_nth_call == 0

    def see_block(name: str, _block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = output if isinstance(output, torch.Tensor) else output[0]
        if is_on() and args and isinstance(args[0], torch.Tensor):
            found.volatility[name].append(float(relative_l1(after, args[0])))

    def see_layer(
        name: str, weight: torch.Tensor, layer: nn.Linear, args: tuple[Any, ...], output: Any
    ) -> None:
        if is_on():
            found.error[name].append(_error(layer, weight, args[0], output))

    for block_name in blocks:
        block = module.get_submodule(block_name)
        found.volatility[block_name] = []
        handles.append(block.register_forward_hook(partial(see_block, block_name)))
        for inner, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and layer.in_features % nvfp4.BLOCK_SIZE == 0:
                name = f"{block_name}.{inner}"
                found.error[name], found.block_of[name] = [], block_name
                weight = nvfp4.fake_quantize_weight(layer.weight.detach())
                handles.append(layer.register_forward_hook(partial(see_layer, name, weight)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def fit_lines(measured: Sequence[Measured]) -> Mapping[str, Line]:
    """The line of every layer over all generations."""
    lines = {}
    for name in measured[0].error:
        pairs = [
            pair
            for one in measured
            for pair in zip(one.volatility[one.block_of[name]], one.error[name][1:], strict=False)
        ]
        if len(pairs) < _LEAST_POINTS:
            continue
        before, error = np.array(pairs, dtype=np.float64).T
        lines[name] = fit_line(before, error)
    return lines


def _count(calls: list[int], _module: nn.Module, _args: Any) -> None:
    calls[0] += 1


@torch.no_grad()
def _error(
    layer: nn.Linear, weight: torch.Tensor, entering: torch.Tensor, output: torch.Tensor
) -> float:
    scale = nvfp4.input_scale(max(float(entering.abs().max()), 1e-6))
    rounded = nvfp4.quantize_dequantize(entering.contiguous(), scale)
    quantized = nn.functional.linear(rounded, weight.to(rounded.dtype), layer.bias)
    return float((quantized - output).norm() / output.norm().clamp_min(1e-12))
