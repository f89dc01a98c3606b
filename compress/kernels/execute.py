r"""Swap the layers of a planned module for layers that run packed weights on real kernels.

    report = execute(module, device="cuda")
    print(*report, sep="\n")

What stays simulated is said too: convolutions have no kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vcompress.compress.attention_products import AttentionProducts
from vcompress.compress.attention_sites import products_of
from vcompress.compress.dynamic.executor import dynamic_precision_of
from vcompress.compress.frozen import FrozenLayer, FrozenLinear
from vcompress.compress.kernels.attention import ExecutableAttention
from vcompress.compress.kernels.available import needs_triton
from vcompress.compress.kernels.linear import FOUR_BIT_INPUTS, ExecutableLinear, FourBitInputs
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["LayerKernel", "execute", "resident_bytes"]

SIMULATED = "simulated in floats"


@dataclass(frozen=True, kw_only=True)
class LayerKernel:
    """What runs for one layer.

    Attributes:
        name: full name of the layer, or of the module that holds an attention's products.
        format: of the plan.
        kernel: what multiplies, for people.
        weight_bits: that the layer's weight takes in memory; 0 for an attention.
    """

    name: str
    format: str
    kernel: str
    weight_bits: int

    @property
    def simulated(self) -> bool:
        """Whether nothing runs in low bits."""
        return self.kernel == SIMULATED

    def __str__(self) -> str:
        """One line."""
        return f"{self.name}: {self.format}, {self.kernel}"


def execute(
    module: nn.Module, *, device: torch.device | str | None = None,
    four_bit_inputs: FourBitInputs = "plan",
) -> tuple[LayerKernel, ...]:  # fmt: skip
    """Let `module`, planned by `apply_plan` or read by `compressed`, run on real kernels, in place.

    On a CPU the same layers run, on torch or, with `TRITON_INTERPRET=1`, on Triton's interpreter:
    slowly, to compare. Save a module before: its `state_dict` is another one afterwards.

    Args:
        device: where the module goes; by default it stays where it is.
        four_bit_inputs: how four-bit weights take their inputs, see `compress.kernels.linear`;
            anything but "plan" is another model than the one that was proven.

    Returns:
        A line for each quantized layer, then for each attention, in the order of the module.

    Raises:
        InputError: no layer of `module` is quantized; its precision changes from step to step; an
            unknown `four_bit_inputs`.
        MissingCapabilityError: a GPU that is not there, or without the package triton.
    """
    if four_bit_inputs not in FOUR_BIT_INPUTS:
        message = (
            f"four_bit_inputs must be one of {', '.join(FOUR_BIT_INPUTS)}, got {four_bit_inputs!r}"
        )
        raise InputError(message)
    if dynamic_precision_of(module) is not None:
        message = (
            f"{type(module).__name__} has dynamic precision, which is simulated only: a kernel has "
            "one precision for every step; remove() it first"
        )
        raise InputError(message)
    if device is not None:
        target = torch.device(device)
        if target.type == "cuda":
            if not torch.cuda.is_available():
                message = f"there is no GPU for device={device!r}; use device='cpu' to compare"
                raise MissingCapabilityError(message)
            needs_triton()
        module.to(target)

    def made(each: nn.Module) -> nn.Module | None:
        if isinstance(each, FrozenLinear) and not isinstance(each, ExecutableLinear):
            return ExecutableLinear(each, four_bit_inputs)
        if isinstance(each, AttentionProducts) and not isinstance(each, ExecutableAttention):
            return ExecutableAttention(each)
        return None

    _swap(module, made)
    _share_rotations(module)
    report = tuple(_lines(module))
    if not report:
        message = (
            f"no layer of {type(module).__name__} is quantized, so nothing can run in low bits; "
            "apply a plan first, with vcompress.apply_plan"
        )
        raise InputError(message)
    return report


def _swap(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every module inside `module` that `make` makes another of; shared ones stay so."""
    # Named twice where it is shared; the original lives on until all of its places are filled.
    places = [
        (parent, child, each)
        for parent in module.modules()
        for child, each in parent._modules.items()
        if each is not None
    ]
    made: dict[nn.Module, nn.Module | None] = {}
    for parent, child, each in places:
        if each not in made:
            made[each] = make(each)
        other = made[each]
        if other is not None:
            setattr(parent, child, other)


def _share_rotations(module: nn.Module) -> None:
    """Let layers that rotate by the same matrix hold one, not one each."""
    shared: dict[tuple[int, torch.device], torch.Tensor] = {}
    for each in module.modules():
        if isinstance(each, FrozenLayer) and each.rotation is not None:
            key = (len(each.rotation), each.rotation.device)
            each.rotation = shared.setdefault(key, each.rotation)


def _lines(module: nn.Module) -> list[LayerKernel]:
    lines = []
    for name, each in module.named_modules():
        if isinstance(each, FrozenLayer):
            kernel = each.kernel if isinstance(each, ExecutableLinear) else SIMULATED
            lines.append(LayerKernel(
                name=name, format=each.format, kernel=kernel, weight_bits=each.weight_bits,
            ))  # fmt: skip
    lines += [
        LayerKernel(
            name=name, format=each.format, weight_bits=0,
            kernel=(each.kernel if isinstance(each, ExecutableAttention) else "") or SIMULATED,
        )
        for name, each in products_of(module).items()
    ]  # fmt: skip
    return lines


def resident_bytes(module: nn.Module) -> int:
    """Bytes that the parameters and buffers of `module` take, each storage once."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(found.values())
