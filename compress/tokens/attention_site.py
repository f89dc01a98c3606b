"""One attention module that is looked into while it runs.

Shapes: as in `intercept`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.compress.tokens.intercept import Intercept, Merging
from vcompress.compress.tokens.windows import GridWindows
from vcompress.spec.errors import InputError

__all__ = ["AttentionSite", "attentions_in", "install", "is_outermost", "site_of", "uninstall"]

_SITE = "vcompress_attention_site"
_WINDOWS = "vcompress_attention_windows"
_TEXT = "encoder_hidden_states"


@dataclass
class AttentionSite:
    """One attention module that is looked into.

    Attributes:
        name: of the module.
        windows: of the raster; a submodule of it.
        merging: how much is merged.
        text_argument: at which place its forward takes the text; None if only by keyword.
        previous: a forward that stood in place of that of its class.
        consulted: whether it ever called the function that is intercepted.
        reduced: whether a call was ever reduced. Both are only ever set, so that clips that run
            at the same time do not disturb each other.
    """

    name: str
    windows: GridWindows
    merging: Merging
    text_argument: int | None
    previous: Callable[..., Any] | None
    consulted: bool = False
    reduced: bool = False


def attentions_in(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost attention modules of `module`, itself included, by full name."""
    if callable(getattr(module, "processor", None)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from attentions_in(child, f"{name}.{child_name}")


def install(name: str, module: nn.Module, windows: GridWindows, merging: Merging) -> AttentionSite:
    """Let `module`, called `name`, attend over fewer tokens."""
    parameters = list(inspect.signature(type(module).forward).parameters)
    site = AttentionSite(
        name=name,
        windows=windows,
        merging=merging,
        # The first parameter is the module itself.
        text_argument=parameters.index(_TEXT) - 1 if _TEXT in parameters else None,
        previous=module.__dict__.get("forward"),
    )
    setattr(module, _SITE, site)
    setattr(module, _WINDOWS, windows)
    # A bound method follows a deep copy of its module, where a closure would not.
    module.__dict__["forward"] = types.MethodType(_forward, module)
    return site


def _run(module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    """Stands in place of the forward of an attention module."""
    site: AttentionSite = getattr(module, _SITE)
    text, place = keywords.get(_TEXT), site.text_argument
    if text is None and place is not None and place < len(inputs):
        text = inputs[place]
    num_text = None if text is None else text.shape[1]
    intercept = Intercept(site.name, site.windows, site.merging, num_text)
    with intercept:
        if site.previous is None:
            output = type(module).forward(module, *inputs, **keywords)
        else:
            output = site.previous(*inputs, **keywords)
    site.consulted |= intercept.consulted
    site.reduced |= intercept.reduced
    if not site.consulted:
        message = (
            f"{site.name} ({type(module).__name__}) does not call scaled_dot_product_attention, "
            "so its tokens cannot be reduced; if another attention backend was chosen, go back to "
            "the native one: set_attention_backend('native')"
        )
        raise InputError(message)
    return output


# Dynamo cannot follow all that processors do inside a function mode, so it steps around the call.
_forward: Callable[..., Any] = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]


def site_of(module: nn.Module) -> AttentionSite | None:
    """What was installed in `module`."""
    site: AttentionSite | None = getattr(module, _SITE, None)
    return site


def is_outermost(module: nn.Module) -> bool:
    """Whether nothing was put over the forward of an installed `module` since."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    previous = getattr(module, _SITE).previous
    del module.__dict__["forward"]
    if previous is not None:
        module.__dict__["forward"] = previous
    delattr(module, _SITE)
    delattr(module, _WINDOWS)
