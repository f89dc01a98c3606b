"""Fewer tokens inside the self-attention of video diffusion transformers, all of them outside.

Just before a self-attention its queries are merged, and its keys with their values; just after it
every token gets the result of the query that it had joined. The residual stream, cross-attention
and MLP see all tokens, and text tokens that take part in the attention are never touched. This is
what denoisers want: their output is dense, and at the length of a video they spend most of their
time in attention.

Source: asymmetric reduction and restoration (Sun et al., 2024, arXiv:2412.11706); written from the
paper. What we changed: tokens merge inside windows of the latent raster (`windows`); shares are
the same at every step and in every block that is reduced, so that a graph is static; merged keys
can be weighed by size. The algorithm is in `intercept`; here it is put into a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import torch
from torch import nn

from vcompress.compress.tokens.attention_site import (
    AttentionSite,
    attentions_in,
    install,
    is_outermost,
    site_of,
    uninstall,
)
from vcompress.compress.tokens.intercept import Merging
from vcompress.compress.tokens.windows import Box, Distance, GridWindows
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import ATTENTIONS

__all__ = ["AttentionReduction", "ReducedAttention", "reduce_attention", "remove_reduction"]

_CHECKS = "vcompress_attention_checks"


@dataclass(frozen=True, kw_only=True)
class AttentionReduction:
    """How much is merged, and where.

    Attributes:
        keep_queries: share of the video tokens that ask, in (0, 1]. Lower is faster and blurs:
            tokens that ask together get the same answer. Start at 0.7.
        keep_keys: share that is asked, in (0, 1]. Costs less than `keep_queries` at the same share,
            see the paper; 0.3 to 0.7.
        window: frames, height and width, in tokens, inside of which tokens merge. Larger finds
            better partners and costs more; 16 to 128 tokens.
        cell: part of a window with one token that the others may join; along the same axes. No
            share can be below one token a cell, so a larger cell allows to keep fewer.
        distance: what likeness is judged by. "euclidean" bounds the error of the scores; "cosine"
            is for comparison.
        attention: how a merged key counts, a name in `spec.token_section.ATTENTIONS`. Weighing by
            size is exact where only equal keys merge; "plain" is less exact, and leaves the width
            of a head as it is and no mask.
        first_block: the first block that is reduced; those before it stay dense.
        last_block: the first block after it that stays dense, as the end of a Python slice; None
            reduces to the end.
    """

    keep_queries: float = 0.7
    keep_keys: float = 0.5
    window: Box = (2, 4, 4)
    cell: Box = (1, 2, 2)
    distance: Distance = "euclidean"
    attention: str = "proportional_fused"
    first_block: int = 1
    last_block: int | None = -1

    def __post_init__(self) -> None:
        _check_box("window", self.window)
        _check_box("cell", self.cell)
        if any(edge > width for edge, width in zip(self.cell, self.window, strict=True)):
            message = f"cell must fit into window {self.window}, got {self.cell}"
            raise InputError(message)
        least = 1 / prod(self.cell)
        for name in ("keep_queries", "keep_keys"):
            share = getattr(self, name)
            if not least <= share <= 1:
                message = (
                    f"{name} must be from {least:.3g}, one token of each cell {self.cell}, to 1, "
                    f"got {share}; widen cell to keep fewer"
                )
                raise InputError(message)
        for name, allowed in (("distance", get_args(Distance)), ("attention", tuple(ATTENTIONS))):
            if getattr(self, name) not in allowed:
                message = f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                raise InputError(message)

    @property
    def reduces(self) -> bool:
        """Whether anything is merged at all."""
        return self.keep_queries < 1 or self.keep_keys < 1

    @property
    def merging(self) -> Merging:
        """What every attention is to do."""
        return Merging(
            keep_queries=self.keep_queries, keep_keys=self.keep_keys, distance=self.distance,
            attention=self.attention,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReducedAttention:
    """What was put in.

    Attributes:
        blocks: full names of the blocks that are reduced; none if all tokens are kept.
        num_tokens: video tokens outside of their attentions.
        num_queries: of them, those that ask.
        num_keys: of them, those that are asked.
    """

    blocks: tuple[str, ...]
    num_tokens: int
    num_queries: int
    num_keys: int


def reduce_attention(
    transformer: nn.Module, grid: Box, settings: AttentionReduction
) -> ReducedAttention:
    """Merge tokens inside the self-attentions of `transformer`, in place.

    Works on transformers of diffusers whose blocks attend over all tokens of a clip at once:
    Wan, CogVideoX, LTX and models like them. Whether a model is one shows in its first run, which
    raises `InputError` with the reason if it is not. Several calls can treat disjoint ranges of
    blocks differently. `remove_reduction` undoes all of them.

    Args:
        transformer: a denoiser, for inference.
        grid: frames, height and width of its tokens: of the latent, after patches were made.
        settings: how much is merged, and where.

    Raises:
        InputError: the settings do not fit the grid or the model.
    """
    _check_box("grid", grid)
    if not settings.reduces:
        count = prod(grid)
        return ReducedAttention(blocks=(), num_tokens=count, num_queries=count, num_keys=count)
    windows = GridWindows(grid, settings.window, settings.cell).to(_device_of(transformer))
    result = ReducedAttention(
        blocks=_block_names(transformer, settings),
        num_tokens=windows.num_tokens,
        num_queries=windows.num_kept(settings.keep_queries),
        num_keys=windows.num_kept(settings.keep_keys),
    )
    _check_rounding(result, settings)
    found = {
        block: tuple(attentions_in(transformer.get_submodule(block), block))
        for block in result.blocks
    }
    taken = [name for part in found.values() for name, module in part if site_of(module)]
    if taken:
        message = f"already reduced: {', '.join(taken)}; call remove_reduction first"
        raise InputError(message)
    sites = {
        block: tuple(install(name, module, windows, settings.merging) for name, module in part)
        for block, part in found.items()
    }
    handle = transformer.register_forward_hook(_Check(sites))
    setattr(transformer, _CHECKS, (*getattr(transformer, _CHECKS, ()), handle))
    return result


def remove_reduction(transformer: nn.Module) -> None:
    """Undo every `reduce_attention`; does nothing where there was none.

    Raises:
        InputError: something else was put over a forward since; nothing is changed then.
    """
    sites = [(module, site) for module in transformer.modules() if (site := site_of(module))]
    for module, site in sites:
        if not is_outermost(module):
            message = (
                f"the forward of {site.name} was replaced after its attention was reduced; take "
                "off what replaced it (offloading, caching hooks), then the reduction"
            )
            raise InputError(message)
    for module, _ in sites:
        uninstall(module)
    for handle in transformer.__dict__.pop(_CHECKS, ()):
        handle.remove()


@dataclass
class _Check:
    """After a run: something must have been reduced in every block that was to be."""

    sites: dict[str, tuple[AttentionSite, ...]]

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        idle = [
            block for block, sites in self.sites.items() if not any(site.reduced for site in sites)
        ]
        if idle:
            message = (
                f"no self-attention over video tokens ran in {', '.join(idle)}; only blocks with "
                "one can be reduced: choose them with first_block and last_block"
            )
            raise InputError(message)


def _block_names(transformer: nn.Module, settings: AttentionReduction) -> tuple[str, ...]:
    """The chosen ones of the largest list of modules that all hold attentions."""
    lists = {
        name: container
        for name, container in transformer.named_modules()
        if isinstance(container, nn.ModuleList)
        and len(container)
        and all(any(attentions_in(block)) for block in container)
    }
    if not lists:
        message = (
            f"{type(transformer).__name__} has no list of blocks with attention modules as "
            "diffusers builds them (with an attribute `processor`), so its attention cannot be "
            "reduced"
        )
        raise InputError(message)
    stem = max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
    names = [f"{stem}.{index}".lstrip(".") for index in range(len(lists[stem]))]
    chosen = tuple(names[settings.first_block : settings.last_block])
    if not chosen:
        message = (
            f"blocks[{settings.first_block}:{settings.last_block}] of {len(names)} blocks are "
            "none; lower first_block, or raise last_block (None is the end)"
        )
        raise InputError(message)
    return chosen


def _device_of(module: nn.Module) -> torch.device:
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


def _check_box(name: str, box: Box) -> None:
    if len(box) != 3 or not all(isinstance(edge, int) and edge > 0 for edge in box):
        message = f"{name} must be three numbers of tokens (frames, height, width), got {box}"
        raise InputError(message)


def _check_rounding(result: ReducedAttention, settings: AttentionReduction) -> None:
    """A share below 1 that is rounded to all tokens is refused rather than passed over."""
    for name, count in (("keep_queries", result.num_queries), ("keep_keys", result.num_keys)):
        share = getattr(settings, name)
        if share < 1 and count == result.num_tokens:
            message = (
                f"{name}={share} keeps all tokens of a window {settings.window} with one receiver "
                f"a cell {settings.cell} on this grid; widen window or cell, or lower the share"
            )
            raise InputError(message)
