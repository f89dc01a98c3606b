"""Where a model calls attention, and how its calls are answered by another function.

What: modules are found by running the model once; an attention is the innermost module that was
running when `scaled_dot_product_attention` was called, whatever its class. While such a module
runs, a function mode hands its calls to what was put there. No forward is copied, so every form
works that ends in that function: the sdpa form of transformers, the processors of diffusers, and
plain torch. The eager form of transformers computes the same with other functions; it is changed
to the sdpa form first.

The same mechanism reduces tokens inside of attention; see `tokens.intercept`. Both can be in one
module: the one that was put there last sees the call that the other makes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vcompress.compress.attention_products import AttentionProducts, attend_plainly
from vcompress.models.calls import Batch, run_module
from vcompress.spec.attention_section import AttentionChoice
from vcompress.spec.formats import FLOAT

__all__ = [
    "AttentionCall", "apply_attention", "attention_applied", "exact_attention",
    "find_attentions", "intercepted", "operands_of", "products_of", "sdpa_form", "use_sdpa",
]  # fmt: skip

Attend = Callable[..., torch.Tensor]
# (name of the module, arguments and keywords of the call) -> the result.
Answer = Callable[[str, tuple[Any, ...], Mapping[str, Any]], torch.Tensor]

_PRODUCTS = "vcompress_products"
_SITE = "vcompress_products_site"


@dataclass(frozen=True)
class AttentionCall:
    """The sizes of one call: B sequences times heads, L queries, S keys, widths D and F."""

    num_rows: int
    num_queries: int
    num_keys: int
    width: int
    value_width: int


class _Redirect(TorchFunctionMode):
    """Hands every call of `scaled_dot_product_attention` to `attend`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def intercepted(module: nn.Module, answer: Answer) -> Iterator[None]:
    """Let `answer` reply to every call of attention inside `module` that comes through torch.

    It is told the full name of the innermost module that is running, or "" for `module` itself.
    """
    running: list[str] = [""]

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        return answer(running[-1], args, kwargs)

    with ExitStack() as hooks:
        for name, submodule in module.named_modules():
            if not name:
                continue

            def enter(_m: nn.Module, _i: Any, name: str = name) -> None:
                running.append(name)

            def leave(_m: nn.Module, _i: Any, _o: Any) -> None:
                running.pop()

            hooks.callback(submodule.register_forward_pre_hook(enter).remove)
            hooks.callback(submodule.register_forward_hook(leave, always_call=True).remove)
        with _Redirect(attend):
            yield


def find_attentions(module: nn.Module, example: Batch) -> dict[str, tuple[AttentionCall, ...]]:
    """The calls of each attention of `module`, by full name, in the order of their first calls.

    Attention that the module does itself, outside of any submodule, has no name and is left out.
    """
    calls: dict[str, list[AttentionCall]] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        calls.setdefault(name, []).append(_sizes_of(args, kwargs))
        return attend_plainly(*args, **kwargs)

    with ExitStack() as hooks, sdpa_form(module), intercepted(module, note), torch.inference_mode():
        for name, products in products_of(module).items():
            # What is quantized already is asked directly.
            def see(_m: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls.setdefault(name, []).append(_sizes_of(args, kwargs))

            hooks.callback(products.register_forward_pre_hook(see, with_kwargs=True).remove)
        run_module(module, example)
    return {name: tuple(found) for name, found in calls.items() if name}


def operands_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Query, key and value of a call."""
    names = ("query", "key", "value")
    query, key, value = [*args, *(kwargs[name] for name in names if name in kwargs)][:3]
    return query, key, value


def _sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AttentionCall:
    query, key, value = operands_of(args, kwargs)
    return AttentionCall(
        num_rows=query[..., 0, 0].numel(), num_queries=query.shape[-2], num_keys=key.shape[-2],
        width=query.shape[-1], value_width=value.shape[-1],
    )  # fmt: skip


def _eager_configurations(module: nn.Module) -> list[Any]:
    """Configurations of transformers that ask for the eager form where the sdpa form exists."""
    found = {
        id(config): config
        for submodule in module.modules()
        if getattr(submodule, "_supports_sdpa", False)
        for config in (getattr(submodule, "config", None),)
        if getattr(config, "_attn_implementation", None) == "eager"
    }
    return list(found.values())


def use_sdpa(module: nn.Module) -> None:
    """Change what runs in the eager form of transformers to the sdpa form, in place."""
    for config in _eager_configurations(module):
        config._attn_implementation = "sdpa"


@contextmanager
def sdpa_form(module: nn.Module) -> Iterator[None]:
    """`use_sdpa`, for a while."""
    changed = _eager_configurations(module)
    use_sdpa(module)
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "eager"


@dataclass
class _Site:
    """What stands in place of a module's forward.

    Attributes:
        previous: a forward that stood there before in place of that of the class.
    """

    previous: Callable[..., Any] | None


def apply_attention(module: nn.Module, choices: Mapping[str, AttentionChoice]) -> None:
    """Let the attentions of `choices` that are not kept run their products in their format.

    A kept attention inside of another one that is not kept answers its own calls as before.
    """
    if any(choice.format != FLOAT for choice in choices.values()):
        use_sdpa(module)
    for name, choice in _placed(choices):
        place = module.get_submodule(name)
        setattr(place, _SITE, _Site(place.__dict__.get("forward")))
        if choice.format != FLOAT:
            place.add_module(_PRODUCTS, AttentionProducts(choice))
        # A bound method follows a deep copy of its module, where a closure would not.
        place.__dict__["forward"] = types.MethodType(_forward, place)


@contextmanager
def attention_applied(module: nn.Module, choices: Mapping[str, AttentionChoice]) -> Iterator[None]:
    """`apply_attention`, for a while; nothing else may be put over these modules meanwhile."""
    with sdpa_form(module):
        apply_attention(module, choices)
        try:
            yield
        finally:
            for name, _ in _placed(choices):
                _remove(module.get_submodule(name))


@contextmanager
def exact_attention(module: nn.Module) -> Iterator[None]:
    """Let quantized attentions inside `module` compute exactly for a while, with gradients."""
    quantized = products_of(module).values()
    for products in quantized:
        # An attribute of the instance hides the method of its class.
        products.__dict__["forward"] = attend_plainly
    try:
        yield
    finally:
        for products in quantized:
            del products.__dict__["forward"]


def _placed(choices: Mapping[str, AttentionChoice]) -> list[tuple[str, AttentionChoice]]:
    """The attentions that need a forward of ours."""
    chosen = [name for name, choice in choices.items() if choice.format != FLOAT]
    return [
        (name, choice)
        for name, choice in choices.items()
        if name in chosen or any(name.startswith(f"{other}.") for other in chosen)
    ]


def _remove(place: nn.Module) -> None:
    previous = getattr(place, _SITE).previous
    del place.__dict__["forward"]
    if previous is not None:
        place.__dict__["forward"] = previous
    place._modules.pop(_PRODUCTS, None)
    delattr(place, _SITE)


def products_of(module: nn.Module) -> dict[str, AttentionProducts]:
    """The quantized attentions inside `module`, by full name."""
    return {
        name.removesuffix(f".{_PRODUCTS}").removesuffix(_PRODUCTS): each
        for name, each in module.named_modules()
        if isinstance(each, AttentionProducts)
    }


def _run(module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
    """Stands in place of the forward of an attention."""
    site: _Site = getattr(module, _SITE)
    products = getattr(module, _PRODUCTS, attend_plainly)
    with _Redirect(products):
        if site.previous is None:
            return type(module).forward(module, *inputs, **keywords)
        return site.previous(*inputs, **keywords)


# Dynamo cannot follow all that attentions do inside a function mode, so it steps around the call.
_forward: Callable[..., Any] = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
