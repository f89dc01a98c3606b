"""Find the token schedule that costs least, at a number of operations or under a bar of quality.

What: a search over techniques, blocks, counts and the form of attention, each judged by the task's
loss on calibration clips, in three steps.
1. Shapes (`shapes.starting_shapes`), all with the plain technique, on few clips.
2. The best shapes with every technique that the model takes, and those from the first block on with
   a technique that reads pixels there and the plain one behind it (what is flat or at rest goes
   before the model looks; what is alike, after), on few clips; the best on all clips.
3. The best three of these by small moves (another technique at one place, a place moved, added or
   left out, tokens shifted between places), each fitted back to the budget, as long as one helps.

Source: ours. DiffRate (Chen et al., 2023, arXiv:2305.17997) finds counts per block by gradients
over epochs of training data; forward passes on some dozen clips are all that is used here. Losses
of single places do not add up (one matching changes what the next finds), so whole schedules run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch

from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.plan import default_technique
from vcompress.compress.tokens.rules import objection_to
from vcompress.compress.tokens.shapes import Candidate, Fitter, Site, starting_shapes
from vcompress.compress.tokens.trials import Measured, Trials
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection

__all__ = ["Found", "TokenSearch"]

# Shares of the operations that a bar of quality is tried at, from the first downwards.
_LADDER = (0.8, 0.65, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
_ATTENTIONS = ("plain", "proportional")
_SCREENING_SHARE = 0.25  # of the clips
_NUM_SHAPES_KEPT, _NUM_FINALISTS, _NUM_MOVED = 4, 8, 3
_MAX_MOVES, _WORTH_MOVING = 50, 0.99


@dataclass(frozen=True)
class Found:
    """A schedule, what it costs, and the candidate that it is fitted from."""

    section: TokenSection
    measured: Measured
    flop_share: float
    candidate: Candidate


class TokenSearch:
    """Searches schedules for one model; see the module.

    Args:
        trials: of the model, on the clips that schedules are judged on.
        max_moves: schedules that step 3 may try from each of the best.
    """

    def __init__(self, trials: Trials, max_moves: int = _MAX_MOVES) -> None:
        self._trials, self._max_moves = trials, max_moves
        self._fitter = Fitter(trials.model)
        self._techniques = tuple(
            name
            for name, technique in TECHNIQUES.items()
            if not technique.is_control and objection_to(trials.model, name) is None
        )

    def at_share(self, share: float) -> Found:
        """The schedule of least loss within `share` of the operations.

        Raises:
            InputError: no schedule gets there.
        """
        finalists = self._finalists(share)
        if not finalists:
            message = (
                f"no token schedule of {self._trials.model.name} gets to {share:.2f} of its "
                "operations; ask for more"
            )
            raise InputError(message)
        moved = [self._improved(found, share) for found in finalists[:_NUM_MOVED]]
        return min(moved, key=lambda found: found.measured.loss)

    def improved(self, section: TokenSection, share: float) -> Found:
        """The third step alone, from `section`.

        Raises:
            InputError: it does not get to `share` of the operations.
        """
        blocks = self._trials.model.token_blocks
        sites = (
            Site(blocks.index(block), site.technique, site.keep / section.num_patches)
            for block, site in section.sites.items()
        )
        found = self._tried(Candidate(tuple(sites), section.attention), share, None)
        if found is None:
            message = f"the schedule does not get to {share:.2f} of the operations"
            raise InputError(message)
        return self._improved(found, share)

    def within(self, budget: Budget) -> Found | None:
        """The schedule of fewest operations that holds `budget`; None if none does.

        The shapes are searched once, in the middle of the ladder; every other share only moves the
        best of them.
        """
        best: Found | None = None
        carried: list[Candidate] = []
        for share in _LADDER:
            if not carried:
                carried = [found.candidate for found in self._finalists(0.5)]
            found = self._best_of(carried, share)
            if found is None:
                continue
            if not holds(budget, found.measured):
                found = self._improved(found, share, budget)
            if not holds(budget, found.measured):
                break
            best, carried = found, [found.candidate, *carried]
        return best

    def fitted(self, section: TokenSection) -> dict[str, torch.Tensor]:
        """Tensors of the fitted techniques in `section`, fitted to the search clips."""
        return self._trials.fitted(section)

    def _finalists(self, share: float) -> list[Found]:
        """The best few candidates, judged on all clips, the best first."""
        plain = default_technique(self._trials.model)
        screening = max(1, round(_SCREENING_SHARE * len(self._trials.batches)))
        shapes = [
            tuple(Site(block, plain, left) for block, left in shape)
            for shape in starting_shapes(len(self._trials.model.token_blocks))
        ]
        screened = self._ranked(
            (Candidate(sites, attention) for sites in shapes for attention in _ATTENTIONS),
            share, screening,
        )  # fmt: skip
        kept = list(dict.fromkeys(found.candidate.sites for found in screened))
        by_technique = (
            Candidate(sites, attention).with_technique(technique, attention)
            for sites in kept[:_NUM_SHAPES_KEPT]
            for technique in self._techniques
            for attention in _ATTENTIONS
        )
        ranked = self._ranked(chain(by_technique, self._behind_pixels(shapes)), share, screening)
        best = ranked[:_NUM_FINALISTS]
        return self._ranked((found.candidate for found in best), share, None)

    def _behind_pixels(self, shapes: Sequence[tuple[Site, ...]]) -> Iterator[Candidate]:
        """Shapes of several places, the first one in front of all blocks and read off pixels."""
        for sites in shapes:
            if len(sites) < 2 or sites[0].block != 0:
                continue
            for technique in self._techniques:
                if TECHNIQUES[technique].pixels is not None:
                    first = replace(sites[0], technique=technique)
                    for attention in _ATTENTIONS:
                        yield Candidate((first, *sites[1:]), attention)

    def _best_of(self, candidates: Sequence[Candidate], share: float) -> Found | None:
        ranked = self._ranked(dict.fromkeys(candidates), share, None)
        return ranked[0] if ranked else None

    def _ranked(
        self, candidates: Iterable[Candidate], share: float,
        num_batches: int | None,
    ) -> list[Found]:  # fmt: skip
        found = [self._tried(candidate, share, num_batches) for candidate in candidates]
        return sorted(
            (each for each in found if each is not None), key=lambda each: each.measured.loss
        )

    def _tried(self, candidate: Candidate, share: float, num_batches: int | None) -> Found | None:
        if not _is_ordered(candidate, len(self._trials.model.token_blocks)):
            return None
        section = self._fitter.fit(candidate, share)
        if section is None or self._trials.objection(section) is not None:
            return None
        measured = self._trials.measure(section, num_batches)
        return Found(section, measured, self._fitter.share_of(section), candidate)

    def _improved(self, found: Found, share: float, budget: Budget | None = None) -> Found:
        """The first move that helps is made, until none does or `budget` is held."""
        allowed = self._trials.num_measured + self._max_moves
        moved = True
        while moved and self._trials.num_measured < allowed:
            moved = False
            for candidate in self._moves(found.candidate):
                other = self._tried(candidate, share, None)
                if other and other.measured.loss < _WORTH_MOVING * found.measured.loss:
                    found, moved = other, True
                    break
                if self._trials.num_measured >= allowed:
                    break
            if budget is not None and holds(budget, found.measured):
                return found
        return found

    def _moves(self, candidate: Candidate) -> Iterator[Candidate]:
        """Small changes of `candidate`, those that change most first."""
        sites, num_blocks = candidate.sites, len(self._trials.model.token_blocks)
        for attention in _ATTENTIONS:
            if attention != candidate.attention:
                yield replace(candidate, attention=attention)
        for place, site in enumerate(sites):
            for technique in self._techniques:
                if technique != site.technique:
                    yield _changed(candidate, place, replace(site, technique=technique))
            for block in (site.block - 1, site.block + 1):
                yield _changed(candidate, place, replace(site, block=block))
            for factor in (0.7, 0.85, 1.18, 1.4):
                share = min(0.999, site.share * factor)
                yield _changed(candidate, place, replace(site, share=share))
        for place in range(len(sites)):
            if len(sites) > 1:
                yield Candidate(sites[:place] + sites[place + 1 :], candidate.attention)
        taken = {site.block for site in sites}
        for block in range(num_blocks):
            if block not in taken:
                yield Candidate(_with_place(sites, block), candidate.attention)


def holds(budget: Budget, measured: Measured) -> bool:
    """Whether what was measured is within a bar of quality.

    Raises:
        InputError: `budget` is not one that tokens are searched under.
    """
    if budget.kind == "drop_points":
        return measured.changed_points <= budget.limit
    if budget.kind == "sqnr_db":
        return measured.loss <= 10 ** (-budget.limit / 10)
    message = f"tokens cannot be searched under a budget of {budget.kind}"
    raise InputError(message)


def _changed(candidate: Candidate, place: int, site: Site) -> Candidate:
    sites = [*candidate.sites[:place], site, *candidate.sites[place + 1 :]]
    return Candidate(tuple(sites), candidate.attention)


def _with_place(sites: tuple[Site, ...], block: int) -> tuple[Site, ...]:
    """`sites` and one more in front of `block`, halfway between its neighbours."""
    before = [site for site in sites if site.block < block]
    after = [site for site in sites if site.block > block]
    low = before[-1].share if before else 1.0
    high = after[0].share if after else low * 0.7
    technique = (after or before)[0].technique
    return (*before, Site(block, technique, (low + high) / 2), *after)


def _is_ordered(candidate: Candidate, num_blocks: int) -> bool:
    """Whether places come in the order of the blocks and never give tokens back."""
    if not candidate.sites:
        return False
    blocks = [site.block for site in candidate.sites]
    shares = [site.share for site in candidate.sites]
    return (
        blocks[0] >= 0
        and blocks[-1] < num_blocks
        and all(first < second for first, second in pairwise(blocks))
        and all(first > second for first, second in pairwise(shares))
    )
