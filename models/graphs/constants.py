"""Constants and attributes of ONNX nodes as Python and torch have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vcompress.models.graphs.operators import TYPES
from vcompress.models.graphs.pooling import paddings
from vcompress.models.graphs.values import MAX_HOST_ELEMENTS
from vcompress.spec.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Constant", "attribute", "geometry", "identity", "is_bias", "plain", "tensor_of"]


@dataclass(frozen=True)
class Constant:
    """A value that is known: a tensor, a number or sizes, and the initializer it comes from."""

    value: Any
    name: str = ""


def identity(constant: Constant | None) -> str | int | None:
    """What equal constants have in common: the initializer, or else the very value."""
    return None if constant is None else constant.name or id(constant.value)


def tensor_of(constant: Any) -> torch.Tensor:
    """The tensor of an initializer or attribute, in float32 if it is floating point."""
    dtype = TYPES.get(int(constant.dtype))
    if dtype is None:
        message = f"{constant.name} holds {constant.dtype.name}, which is not translated"
        raise InputError(message)
    array = constant.numpy()
    if int(constant.dtype) in (10, 16):
        array = array.astype("float32")
    return torch.from_numpy(array.copy()).to(dtype)


def plain(value: Any) -> Any:
    """Numbers and sizes as Python values; larger tensors as they are."""
    if not isinstance(value, torch.Tensor):
        return tuple(value) if isinstance(value, list) else value
    if value.ndim == 0 or (
        value.ndim == 1 and not value.is_floating_point() and value.numel() <= MAX_HOST_ELEMENTS
    ):
        plain = value.tolist()
        return tuple(plain) if isinstance(plain, list) else plain
    return value


def attribute(attribute: Any) -> Any:
    """The value of a node's attribute."""
    value = attribute.value
    if hasattr(value, "numpy") and hasattr(value, "dtype"):
        return tensor_of(value)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, tuple | list) else value


def is_bias(value: Any, width: int) -> bool:
    """Whether `value` can be added as the bias of a layer with `width` outputs."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.numel() == width
        and value.shape[-1:] == (width,)
    )


def geometry(
    node: ir.Node, weight: torch.Tensor, attributes: Mapping[str, Any], where: str
) -> tuple[bool, list[int], list[int], list[int], list[int]]:
    """Whether padding is the same on both sides; padding, strides, dilations."""
    count = weight.ndim - 2
    strides = attributes.get("strides") or [1] * count
    dilations = attributes.get("dilations") or [1] * count
    auto_pad, sizes = attributes.get("auto_pad", "NOTSET"), [0] * count
    if auto_pad.startswith("SAME"):
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        found = [] if shape is None else [size for size in list(shape)[2:] if isinstance(size, int)]
        if len(found) == count:
            sizes = found
        elif any(stride != 1 for stride in strides):
            message = f"{where}: auto_pad {auto_pad} with strides, of a shape that is not known"
            raise InputError(message)
    before, after = paddings(
        auto_pad, attributes.get("pads"), sizes, list(weight.shape[2:]), strides, dilations
    )
    return before == after, before, after, strides, dilations
