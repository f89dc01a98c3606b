"""Find what fitted techniques need: centres of keys, from calibration clips, site after site.

A site sees what the sites before it left, so it is fitted with those in place. The tensors are
stored with the plan's, one a site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.surgery import apply_reduction, centers_name
from vcompress.compress.tokens.techniques import centroids
from vcompress.compress.tokens.view import View
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection

__all__ = ["fit_sites", "fitted_blocks", "objection_to_fit"]

# Each clip shows more tokens than are kept, so centres are fitted to at least so many keys each.
_LEAST_CLIPS = 8
# More take minutes to find, and their products cost more than a matching does.
_MOST_CENTERS = 1024
_ENOUGH_TOKENS = 16_384


def fitted_blocks(section: TokenSection) -> list[str]:
    """The blocks of `section` whose technique is fitted."""
    fitted = {name for name, technique in TECHNIQUES.items() if technique.is_fitted}
    return [name for name, site in section.sites.items() if site.technique in fitted]


def objection_to_fit(model: VideoModel, section: TokenSection, num_clips: int) -> str | None:
    """Why the fitted sites of `section` cannot be fitted to so many clips, or None."""
    blocks = fitted_blocks(section)
    if blocks and num_clips < _LEAST_CLIPS:
        return f"centres need at least {_LEAST_CLIPS} calibration clips, got {num_clips}"
    for block in blocks:
        count = _num_centers(model, section, block)
        if count > _MOST_CENTERS:
            return f"at most {_MOST_CENTERS} centres are fitted, {block} keeps {count}"
    return None


def fit_sites(
    model: VideoModel, section: TokenSection, batches: Iterable[torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """The tensors that `apply_reduction` needs for `section`, by part; none if none is needed.

    Args:
        model: without reduction.
        section: fits the model.
        batches: calibration clips `[B, *input_shape]`.
        seed: of the draw of first centres.

    Raises:
        InputError: too few clips, or too many centres.
    """
    if not fitted_blocks(section):
        return {}
    clips = list(batches)
    reason = objection_to_fit(model, section, sum(len(batch) for batch in clips))
    if reason is not None:
        message = f"the section tokens cannot be fitted: {reason}; use another technique"
        raise InputError(message)
    tensors: dict[str, torch.Tensor] = {}
    for place, block in enumerate(model.token_blocks):
        if block not in fitted_blocks(section):
            continue
        before = model.token_blocks[: place + 1]
        upto = replace(
            section, sites={name: section.sites[name] for name in before if name in section.sites}
        )
        watcher = _Watcher()
        trial = model.copy()
        apply_reduction(trial, upto, tensors, watch={block: watcher})
        for batch in clips:
            if watcher.num_tokens < _ENOUGH_TOKENS:
                _run(trial, batch)
        if watcher.keys:
            generator = torch.Generator().manual_seed(seed)
            tensors[centers_name(block)] = centroids.fit(
                torch.cat(watcher.keys), torch.cat(watcher.tokens),
                _num_centers(model, section, block), generator,
            )  # fmt: skip
    return tensors


class _Seen(Exception):  # noqa: N818  # no error: what a site sees is known, the rest need not run
    pass


@dataclass
class _Watcher:
    """Keeps what a site sees, in place of reducing it."""

    keys: list[torch.Tensor] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(keys[..., 0].numel() for keys in self.keys)

    def __call__(self, view: View) -> None:
        self.keys.append(view.keys)
        self.tokens.append(view.tokens)
        raise _Seen


def _run(model: VideoModel, batch: torch.Tensor) -> None:
    try:
        model(batch)
    except _Seen:
        return


def _num_centers(model: VideoModel, section: TokenSection, block: str) -> int:
    assert model.token_grid is not None
    return section.sites[block].keep // Layout(model.token_grid).sequences_per_clip
