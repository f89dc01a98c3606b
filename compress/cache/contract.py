"""The contract of a block: which of its outputs carries on which of its arguments.

A block of a video transformer takes the hidden stream, perhaps a text stream, and things that stay
the same (time embedding, positions, masks), and returns the streams. No name is relied on: where a
block's output is the very tensor that the next block is given, the argument that receives it is the
stream's. Where the model works on tokens between two blocks, so that nothing can be followed, each
output carries on the first argument of its shape and type. An output that carries on nothing is
kept whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vcompress.spec.errors import InputError

__all__ = ["Outputs", "bind", "followed", "outputs_of", "streams"]


@dataclass(frozen=True)
class Outputs:
    """What a block returned: its tensors, and how to return others in their place."""

    kind: type
    tensors: tuple[torch.Tensor | None, ...]

    def rebuilt(self, tensors: Iterable[torch.Tensor | None]) -> Any:
        """`tensors` in the form that the block returned its own."""
        tensors = list(tensors)
        return tensors[0] if self.kind is torch.Tensor else self.kind(tensors)

    def without_tensors(self) -> Outputs:
        """The form alone."""
        return Outputs(self.kind, (None,) * len(self.tensors))


def outputs_of(block: str, output: Any) -> Outputs:
    """Read what the block called `block` returned.

    Raises:
        InputError: it is neither a tensor nor a tuple or list of tensors and None.
    """
    if isinstance(output, torch.Tensor):
        return Outputs(torch.Tensor, (output,))
    if type(output) in (tuple, list) and all(
        item is None or isinstance(item, torch.Tensor) for item in output
    ):
        return Outputs(type(output), tuple(output))
    message = (
        f"block {block} must return a tensor or a tuple of tensors to be cached, got "
        f"{type(output).__name__}; name other blocks in cache.blocks, or take the policy "
        "easycache, which leaves blocks alone"
    )
    raise InputError(message)


def bind(
    signature: inspect.Signature, positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, in the order of the signature; those of `*x` and `**x` one by one."""
    arguments: dict[str, Any] = {}
    for name, value in signature.bind(*positional, **keywords).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}.{index}": item for index, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def followed(outputs: Outputs, arguments: Mapping[str, Any]) -> dict[int, str]:
    """Which argument of the next block is which output of the one before, by identity."""
    links: dict[int, str] = {}
    for index, tensor in enumerate(outputs.tensors):
        for name, value in arguments.items():
            if tensor is not None and value is tensor and name not in links.values():
                links[index] = name
                break
    return links


def streams(
    arguments: Mapping[str, Any], outputs: Outputs, links: Mapping[int, str]
) -> tuple[str | None, ...]:
    """The argument that each output carries on, None where it carries on nothing.

    Args:
        arguments: what the first of the blocks was given.
        outputs: what the last of them returned.
        links: what is known from identity; if anything is, shapes are not looked at.
    """
    names: list[str | None] = []
    for index, tensor in enumerate(outputs.tensors):
        found: str | None = None
        if tensor is not None and links:
            name = links.get(index)
            found = name if name is not None and _fits(arguments.get(name), tensor) else None
        elif tensor is not None:
            candidates = (
                name
                for name, value in arguments.items()
                if name not in names and _fits(value, tensor)
            )
            found = next(candidates, None)
        names.append(found)
    return tuple(names)


def _fits(value: Any, tensor: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.shape == tensor.shape
        and value.dtype == tensor.dtype
        and value.device == tensor.device
    )
