"""Find the layers and the repeated blocks of any module by running it once.

Nothing is matched by class name or attribute name: a layer is a linear or a convolution that ran,
a block is a member of a list of modules of one class that together hold most of these layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vcompress.models.calls import Batch, Call, run_module
from vcompress.models.video import primary_output
from vcompress.spec.errors import InputError
from vcompress.spec.plan import LayerFacts

__all__ = [
    "HoldsProduct", "computes_alike", "find_blocks", "find_layers", "find_shared_inputs",
    "is_plain", "layer_kind", "run_once", "without_fused_encoders",
]  # fmt: skip

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
)
# What rounding may do, relative to the largest output.
_TOLERANCE = 1e-4


class HoldsProduct:
    """Mixed into a convolution whose product is another layer, see `convolution_products`."""


def layer_kind(module: nn.Module) -> str | None:
    """One of the kinds "linear", "conv1d", "conv2d" and "conv3d"; None for other modules."""
    if isinstance(module, HoldsProduct):
        return None
    for cls, kind in _KINDS:
        if isinstance(module, cls):
            return kind
    return None


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what torch's own class does, and no more.

    A subclass with a forward of its own may pad, scale its weight, or split its input.
    """
    base = next(cls for cls, _ in _KINDS if isinstance(layer, cls))
    return all(
        getattr(type(layer), name, None) is getattr(base, name, None)
        for name in ("forward", "_conv_forward")
    )


def without_fused_encoders(module: nn.Module) -> nn.Module:
    """`module` whose `nn.TransformerEncoder`s call their layers one by one.

    In evaluation mode they hand all weights to one fused kernel, which passes by the layers that
    were put in their place.
    """
    for submodule in module.modules():
        if isinstance(submodule, nn.TransformerEncoder):
            submodule.use_nested_tensor = False
        elif isinstance(submodule, nn.TransformerEncoderLayer):
            # The switch that the class itself uses for an activation that its kernel lacks.
            submodule.activation_relu_or_gelu = 0
    return module


def run_once(module: nn.Module, example: Batch) -> set[str]:
    """Run `module` on `example` and return the names of the submodules that were called."""
    called: set[str] = set()
    handles = [
        submodule.register_forward_pre_hook(lambda _m, _i, name=name: called.add(name))
        for name, submodule in module.named_modules()
    ]
    try:
        with torch.inference_mode():
            output = run_module(module, example)
    except Exception as error:
        raise InputError(_does_not_run(example, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    primary_output(output)
    return called


def computes_alike(module: nn.Module, changed: nn.Module, example: Batch) -> bool:
    """Whether `changed` gives on `example` what `module` gives, up to what rounding may do.

    A module that does not run at all is alike: that is said by who runs it next, with the reason.
    """
    with torch.inference_mode():
        try:
            expected = primary_output(run_module(module, example))
        except Exception:
            return True
        try:
            got = primary_output(run_module(changed, example))
        except Exception:
            return False
        if got.shape != expected.shape:
            return False
        bound = _TOLERANCE * max(float(expected.abs().amax()), torch.finfo(expected.dtype).tiny)
        return bool(((got - expected).abs() <= bound).all())


def _does_not_run(example: Batch, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(example, Call):
        return (
            f"the model does not run on {example.spec}: {reason}; record calls of this very model "
            "with vcompress.record_calls"
        )
    return (
        f"the model does not run on an input of shape {tuple(example.shape)} "
        f"({example.dtype}): {reason}; "
        "give the right shape, layout and type with --input-spec"
    )


def find_layers(module: nn.Module, called: set[str]) -> dict[str, LayerFacts]:
    """The linears and convolutions among the `called` submodules, in the order of the module."""
    layers: dict[str, LayerFacts] = {}
    for name, submodule in module.named_modules():
        kind = layer_kind(submodule)
        if kind is not None and name in called:
            weight = submodule.weight
            assert isinstance(weight, torch.Tensor)
            layers[name] = LayerFacts(
                kind=kind,
                weight_shape=tuple(weight.shape),
                padding_mode=str(getattr(submodule, "padding_mode", "zeros")),
                own_forward="" if is_plain(submodule) else type(submodule).__name__,
            )
    return layers


def find_blocks(module: nn.Module, layers: dict[str, LayerFacts]) -> tuple[str, ...]:
    """Full names of the repeated blocks: the outermost lists of like modules that hold layers.

    Several lists (temporal and spatial blocks, two towers) are all taken, in module order.
    """
    blocks: list[str] = []
    for name, container in module.named_modules():
        if any(name.startswith(f"{block}.") or name == block for block in blocks):
            continue
        if isinstance(container, nn.ModuleList | nn.Sequential):
            blocks += _like_members(name, container, layers)
    return tuple(blocks)


def _like_members(name: str, container: nn.Module, layers: dict[str, LayerFacts]) -> Iterator[str]:
    members = [
        (f"{name}.{child}" if name else child, submodule)
        for child, submodule in container.named_children()
        if any(True for _ in submodule.children())
    ]
    classes = [type(submodule) for _, submodule in members]
    for full_name, submodule in members:
        holds_layers = any(layer.startswith(f"{full_name}.") for layer in layers)
        if holds_layers and classes.count(type(submodule)) >= 2:
            yield full_name


def find_shared_inputs(
    module: nn.Module, layers: Collection[str], example: Batch
) -> tuple[tuple[str, ...], ...]:
    """Groups of linears that receive the very same tensor, as query, key and value do.

    A runtime fuses such layers into one, or quantizes their input once; both need one format.
    Every layer of `layers` that ran is in exactly one group, in the order of the calls; most are
    alone in theirs. A layer that is called with several tensors ties all who receive one of them.
    """
    receivers: dict[tuple[int, int], list[str]] = {}
    kept: list[torch.Tensor] = []  # an address is not used again while its tensor lives

    def hook(name: str) -> Callable[..., None]:
        def see(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            value = (*arguments, *keywords.values())[0]
            kept.append(value)
            # A convolution shares nothing that a runtime would fuse, and a tensor that was worked
            # on in place since is another one.
            shared = isinstance(layer, nn.Linear)
            key = (id(value), value._version) if shared else (-len(kept), 0)
            receivers.setdefault(key, []).append(name)

        return see

    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in layers
    ]
    try:
        # Tensors of the inference mode do not count their changes.
        with torch.inference_mode(False), torch.no_grad():
            run_module(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return _united(receivers.values())


def _united(groups: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Groups that have a member in common become one."""
    united: list[dict[str, None]] = []
    for names in groups:
        group = dict.fromkeys(names)
        touched = [other for other in united if other.keys() & group.keys()]
        if touched:
            for other in touched[1:]:
                united.remove(other)
            group = {**{name: None for other in touched for name in other}, **group}
            united[united.index(touched[0])] = group
        else:
            united.append(group)
    return tuple(tuple(group) for group in united)
