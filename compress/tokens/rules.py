"""What a model can take: why a section, a technique or a block is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.catalog import TECHNIQUES, Technique, find_technique
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection, TokenSite

__all__ = [
    "Remains", "check_section", "frames_at", "objection", "objection_to", "problems_of",
]  # fmt: skip


def objection(model: VideoModel) -> str | None:
    """Why tokens of `model` cannot be reduced at all, or None."""
    if model.token_grid is None:
        return f"the token grid of family {model.family!r} is not known"
    if not model.token_blocks:
        return (
            f"tokens are reduced in front of repeated blocks, and family {model.family!r} has no "
            "two alike here"
        )
    if model.pooling is None:
        return f"how family {model.family!r} pools its tokens is not known"
    if not hasattr(model.module, "set_attn_implementation"):
        return f"the attention of family {model.family!r} cannot be exchanged"
    return None


def objection_to(model: VideoModel, technique: str) -> str | None:
    """Why `model` cannot take the technique called `technique`, or None."""
    whole = objection(model)
    if whole is not None:
        return whole
    assert model.token_grid is not None
    layout, found = Layout(model.token_grid), TECHNIQUES[technique]
    if layout.needs_all_frames_alike and found.raster != "places":
        return (
            f"family {model.family!r} attends over time at each place, so every frame has to keep "
            "the same places"
        )
    if layout.num_frames == 1 and found.needs_raster and found.raster != "places":
        return f"family {model.family!r} works on each frame alone, so frames cannot be compared"
    return None


def check_section(model: VideoModel, section: TokenSection) -> None:
    """Raise one `InputError` that lists everything in `section` that does not fit `model`."""
    problems = problems_of(model, section)
    if problems:
        message = "the section tokens does not fit the model:\n  " + "\n  ".join(problems)
        raise InputError(message)


def problems_of(model: VideoModel, section: TokenSection) -> list[str]:
    """Everything in `section` that does not fit `model`, one line each.

    Raises:
        InputError: a technique that does not exist.
    """
    reason = objection(model)
    if reason is not None:
        return [f"tokens cannot be reduced: {reason}; remove the section tokens"]
    assert model.token_grid is not None
    problems: list[str] = []
    if section.num_patches != model.token_grid.num_patches:
        problems.append(
            f"tokens.num_patches must be {model.token_grid.num_patches}, as the model has, got "
            f"{section.num_patches}"
        )
    problems += [
        f"tokens.sites.{name}: tokens can only be reduced in front of one of "
        f"{', '.join(model.token_blocks)}"
        for name in section.sites
        if name not in model.token_blocks
    ]
    return problems + _site_problems(model, section)


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What is left of a clip's patches in front of a block.

    Attributes:
        tokens: patch tokens of a clip.
        frames: of the raster of one sequence; None where there is no raster any more.
        sequences: of a clip.
    """

    tokens: int
    frames: int | None
    sequences: int

    @classmethod
    def of(cls, model: VideoModel, num_patches: int | None = None) -> Remains:
        """In front of the first block; `num_patches` are those of the grid by default."""
        grid = model.token_grid
        assert grid is not None
        layout = Layout(grid)
        return cls(
            tokens=grid.num_patches if num_patches is None else num_patches,
            frames=layout.num_frames, sequences=layout.sequences_per_clip,
        )  # fmt: skip

    def unit(self, technique: Technique) -> int:
        """What the number of tokens that `technique` keeps has to be a multiple of."""
        if technique.raster == "places" and self.frames is not None:
            return self.sequences * self.frames
        if technique.raster == "frames" and self.frames is not None:
            return max(1, self.tokens // self.frames)
        return self.sequences

    def least(self, technique: Technique) -> int:
        """The fewest tokens that `technique` can keep."""
        whole = technique.num_whole_frames * self.tokens // self.frames if self.frames else 0
        return max(whole, self.unit(technique))

    def after(self, technique: Technique, keep: int) -> Remains:
        """What `technique` leaves when it keeps `keep` tokens."""
        frames = self.frames
        if keep == self.tokens or frames is None or technique.raster == "places":
            return replace(self, tokens=keep)
        if technique.raster == "lost":
            return replace(self, tokens=keep, frames=None)
        return replace(self, tokens=keep, frames=max(1, keep * frames // self.tokens))


def frames_at(model: VideoModel, section: TokenSection) -> dict[str, int | None]:
    """Frames of the raster in front of each block; None where there is no raster any more."""
    left, result = Remains.of(model, section.num_patches), dict[str, int | None]()
    for name in model.token_blocks:
        result[name] = left.frames
        site = section.sites.get(name)
        if site is not None:
            technique = find_technique(site.technique, f"tokens.sites.{name}")
            left = left.after(technique, site.keep)
    return result


def _site_problems(model: VideoModel, section: TokenSection) -> list[str]:
    left, problems = Remains.of(model, section.num_patches), list[str]()
    for name in model.token_blocks:
        site, where = section.sites.get(name), f"tokens.sites.{name}"
        if site is None:
            continue
        technique = find_technique(site.technique, where)
        is_first = name == model.token_blocks[0]
        found = [
            _impossible(model, site.technique, left if site.keep < left.tokens else None, is_first),
            _miscounted(site, technique, left),
        ]
        problems += [f"{where}{problem}" for part in found for problem in part]
        left = left.after(technique, site.keep)
    return problems


def _impossible(
    model: VideoModel, name: str, left: Remains | None, is_first: bool
) -> Iterator[str]:
    """Why the technique `name` cannot reduce what is `left`; None if nothing is reduced."""
    technique, reason = TECHNIQUES[name], objection_to(model, name)
    if reason is not None:
        yield f": {name} is not possible: {reason}"
    if left is None:
        return
    if technique.needs_attention and is_first:
        yield f": {name} reads the attention of the block before; there is none"
    elif technique.needs_raster and left.frames is None:
        yield (f": {name} needs frames with their places, which the reduction before has mixed")


def _miscounted(site: TokenSite, technique: Technique, left: Remains) -> Iterator[str]:
    """What is wrong with the number of tokens that `site` keeps of what is `left`."""
    unit, least = left.unit(technique), left.least(technique)
    if site.keep > left.tokens:
        yield f".keep must be at most {left.tokens}, the tokens there, got {site.keep}"
    if technique.num_whole_frames and site.keep < least:
        yield (
            f".keep must be at least {least}, since {site.technique} keeps the first frame; got "
            f"{site.keep}"
        )
    if site.keep % unit:
        yield f".keep must be a multiple of {unit}, got {site.keep}"
