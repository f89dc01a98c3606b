"""Put token reduction into a model without touching its code.

A hook in front of a block reduces what the block is given; the attention of the model is exchanged
for one that hands over its keys and weighs tokens by size; a model that averages its tokens at the
end gets the size-weighted average. What a family needs beyond this stands in `families`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.attention import TokenState, install_attention
from vcompress.compress.tokens.catalog import Technique, find_technique
from vcompress.compress.tokens.families import FAMILIES
from vcompress.compress.tokens.pixels import PIXEL_FEATURES, PixelFeature
from vcompress.compress.tokens.rules import check_section, frames_at
from vcompress.compress.tokens.view import View
from vcompress.models.video import VideoModel
from vcompress.spec import clip
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection

__all__ = ["Watch", "apply_reduction", "centers_name"]

# Given what a site sees.
Watch = Callable[[View], None]


def centers_name(block: str) -> str:
    """What the tensor of a fitted technique in front of `block` is called."""
    return f"centers_{block}"


def apply_reduction(
    model: VideoModel, section: TokenSection,
    tensors: Mapping[str, torch.Tensor] = MappingProxyType({}),
    watch: Mapping[str, Watch] = MappingProxyType({}),
) -> TokenState | None:  # fmt: skip
    """Install `section` in `model.module`; returns the state that its hooks share.

    A section that keeps all tokens everywhere changes nothing at all and returns None.

    Args:
        model: whose module is changed, in place.
        section: what is done.
        tensors: of fitted techniques, by `centers_name`.
        watch: by block, what is shown the site's view before it reduces.

    Raises:
        InputError: the section does not fit the model, the message lists everything; or a tensor
            is missing or of another shape.
    """
    check_section(model, section)
    assert model.token_grid is not None
    sites = {
        name: replace(site, watch=watch.get(name), centers=_centers(name, site, tensors, watch))
        for name, site in _active_sites(model, section).items()
    }
    if not sites:
        return None
    layout = Layout(model.token_grid)
    state = TokenState(layout=layout, attention=section.attention)
    family = FAMILIES.get(model.family)
    blocks = model.token_blocks
    if family is not None and family.prepare is not None:
        family.prepare(model, state)
    if family is None or family.uses_attention_interface:
        install_attention(
            model.module,
            [model.layer(name) for name in blocks],
            [model.layer(name) for name in model.token_grid.readers],
            state,
        )
    features = {site.technique.pixels for site in sites.values()} - {None}
    for feature in sorted(features, key=str):
        assert feature is not None
        model.module.register_forward_pre_hook(_Pixels(state, model.clip.layout, feature))
    model.layer(blocks[0]).register_forward_pre_hook(_Start(state))
    for name in blocks:
        if name in sites:
            model.layer(name).register_forward_pre_hook(
                replace(sites[name], state=state), with_kwargs=True
            )
    if model.pooling == "mean":
        model.layer(blocks[-1]).register_forward_hook(_Weigh(state))
    return state


# The hooks are objects, not closures: a deep copy of the model then copies them together with the
# state that they share, where closures would go on writing into the state of the original.
@dataclass
class _Start:
    state: TokenState

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self.state.reset()


@dataclass
class _Pixels:
    """Looks at the clips that enter the model; `TokenState.reset` leaves what it saw."""

    state: TokenState
    layout: clip.Layout
    feature: PixelFeature

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        tokens = self.state.layout
        found = PIXEL_FEATURES[self.feature](inputs[0], self.layout, tokens.grid)
        per_sequence = tokens.grid.num_patches // tokens.sequences_per_clip
        self.state.pixels[self.feature] = found.reshape(-1, per_sequence)


@dataclass
class _Site:
    """Reduces what a block is given to `keep` tokens a sequence."""

    technique: Technique
    keep: int
    num_frames: int | None
    is_first: bool
    state: TokenState | None = None
    centers: torch.Tensor | None = None
    watch: Watch | None = None

    def __call__(
        self, _block: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (self._reduced(inputs[0]), *inputs[1:]), keywords
        return inputs, {**keywords, "hidden_states": self._reduced(keywords["hidden_states"])}

    def _reduced(self, hidden: torch.Tensor) -> torch.Tensor:
        state = self.state
        assert state is not None
        special, tokens = state.layout.split(hidden)
        sizes = torch.ones_like(tokens[..., 0]) if state.sizes is None else state.sizes
        inputs = None if self.is_first else state.inputs
        # In front of the first block the tokens themselves. Their positions count there, and that
        # is good: equal patches merge with their neighbours rather than with those far away.
        keys = tokens
        if inputs is not None:
            keys = state.layout.split_keys(inputs.key.mean(dim=1))
        view = View(
            tokens=tokens, sizes=sizes, keys=keys, attention=inputs,
            num_special=state.layout.grid.special, num_frames=self.num_frames,
            pixels=state.pixels, centers=self.centers,
        )  # fmt: skip
        if self.watch is not None:
            self.watch(view)
        reducer = self.technique.reduce(view, self.keep)
        positions = state.positions_of(tokens)
        if positions is not None:
            state.positions, _ = reducer.apply(positions, sizes)
        for feature, values in state.pixels.items():
            averaged, _ = reducer.apply(values[..., None], sizes)
            state.pixels[feature] = averaged[..., 0]
        if state.trace:
            state.origin = _followed(state.origin, reducer.destination())
        tokens, state.sizes = reducer.apply(tokens, sizes)
        return state.layout.join(special, tokens)


@dataclass
class _Weigh:
    state: TokenState

    def __call__(self, _block: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        sizes = self.state.sizes
        assert sizes is not None
        # The model divides by the number of tokens; afterwards it has divided by the patches.
        share = sizes * (tokens.shape[1] / sizes.sum(dim=1, keepdim=True))
        tokens = tokens * share.to(tokens.dtype)[..., None]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


def _active_sites(model: VideoModel, section: TokenSection) -> dict[str, _Site]:
    """The sites that reduce something, by block."""
    assert model.token_grid is not None
    sequences = Layout(model.token_grid).sequences_per_clip
    sites: dict[str, _Site] = {}
    frames, left = frames_at(model, section), section.num_patches
    for name in model.token_blocks:
        site = section.sites.get(name)
        if site is None or site.keep == left:
            continue
        sites[name] = _Site(
            technique=find_technique(site.technique, f"tokens.sites.{name}"),
            keep=site.keep // sequences,
            num_frames=frames[name],
            is_first=name == model.token_blocks[0],
        )
        left = site.keep
    return sites


def _centers(
    block: str, site: _Site, tensors: Mapping[str, torch.Tensor], watch: Mapping[str, Watch]
) -> torch.Tensor | None:
    if not site.technique.is_fitted or block in watch:
        return None
    centers = tensors.get(centers_name(block))
    if centers is None or centers.ndim != 2 or centers.shape[0] != site.keep:
        message = (
            f"tokens.sites.{block}: the tensors file has no {site.keep} centres for it; use "
            "another technique there, or make the plan again"
        )
        raise InputError(message)
    return centers


def _followed(origin: torch.Tensor | None, destination: torch.Tensor) -> torch.Tensor:
    if origin is None:
        return destination
    then = destination.gather(1, origin.clamp(min=0))
    return torch.where(origin >= 0, then, origin)
