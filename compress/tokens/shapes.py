"""Schedules as shapes that can be scaled to any number of operations.

A candidate says where tokens are reduced, by what, and how the counts relate to each other; an
exponent p turns the shares x of the patches that are left into x^p, which keeps their order and
moves all of them between 1 (p = 0) and next to nothing. So one number fits a candidate to a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.flops import ScheduleCost, counts_of
from vcompress.compress.tokens.rules import Remains, problems_of
from vcompress.models.video import VideoModel
from vcompress.spec.token_section import TokenSection, TokenSite

__all__ = ["Candidate", "Fitter", "Site", "starting_shapes"]

_BISECTIONS = 40
_NUM_STAIRS = 3
_LARGEST_EXPONENT = 64.0


@dataclass(frozen=True)
class Site:
    """One reduction: in front of which block (by index), by what, to which share of the patches."""

    block: int
    technique: str
    share: float


@dataclass(frozen=True)
class Candidate:
    """A schedule before it is fitted to a budget; sites in the order of the blocks."""

    sites: tuple[Site, ...]
    attention: str

    def with_technique(self, technique: str, attention: str) -> Candidate:
        """The same shape by other means."""
        sites = tuple(replace(site, technique=technique) for site in self.sites)
        return Candidate(sites, attention)


def starting_shapes(num_blocks: int) -> Iterator[tuple[tuple[int, float], ...]]:
    """Shapes worth a look, as (block, share of the patches left): steps, pairs, stairs, ramps.

    Single steps early save most with one matching; ramps lose least at once (Bolya et al., 2022);
    the first block may see fewer tokens too, which is what reduction on pixels amounts to.
    """
    last = num_blocks - 1
    singles = [block for block in range(num_blocks) if block <= max(1, 2 * last // 3)]
    for block in singles:
        yield ((block, 0.5),)
    stride = max(1, num_blocks // 4)
    for first in range(0, last, stride):
        for second in range(first + stride, num_blocks, 2 * stride):
            yield ((first, 0.7), (second, 0.35))
    if num_blocks > _NUM_STAIRS:
        yield tuple((step, 0.6 * 0.65**step) for step in range(_NUM_STAIRS))
    for first in sorted({0, 1, num_blocks // 3}):
        steps = num_blocks - first
        if steps > 1:
            yield tuple((first + step, 1 - 0.8 * (step + 1) / steps) for step in range(steps))


class Fitter:
    """Turns candidates into sections of a given share of the operations."""

    def __init__(self, model: VideoModel) -> None:
        assert model.token_grid is not None
        self._model, self._grid = model, model.token_grid
        self.cost = ScheduleCost.of(model)

    def fit(self, candidate: Candidate, share: float) -> TokenSection | None:
        """The largest section of `candidate` within `share` of the operations.

        None where even its smallest is above, or where `model` does not take it. Counts are what
        each technique can keep of what the one before it left: whole frames of the places that are
        left, the same number of places in the frames that are left.
        """
        low, high = 0.0, _LARGEST_EXPONENT
        section = self._section(candidate, high)
        if self.share_of(section) > share:
            return None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self.share_of(self._section(candidate, middle)) > share:
                low = middle
            else:
                high = middle
        section = self._section(candidate, high)
        return None if problems_of(self._model, section) else section

    def share_of(self, section: TokenSection) -> float:
        """Operations of `section` as a share of those without reduction."""
        return self.cost.share(counts_of(section, self._model.token_blocks))

    def _section(self, candidate: Candidate, exponent: float) -> TokenSection:
        left, sites = Remains.of(self._model), {}
        for site in candidate.sites:
            technique = TECHNIQUES[site.technique]
            unit = left.unit(technique)
            wanted = self._grid.num_patches * site.share**exponent
            keep = min(left.tokens, max(left.least(technique), unit * round(wanted / unit)))
            if keep < left.tokens:
                block = self._model.token_blocks[site.block]
                sites[block] = TokenSite(technique=site.technique, keep=keep)
                left = left.after(technique, keep)
        return TokenSection(
            attention=candidate.attention, num_patches=self._grid.num_patches, sites=sites
        )
