"""What a model can take: why a section, a technique or a block is refused."""

from __future__ import annotations

from vcompress.compress.tokens.arrangement import Layout
from vcompress.compress.tokens.catalog import TECHNIQUES, find_technique
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError
from vcompress.spec.token_section import TokenSection

__all__ = ["check_section", "frames_at", "objection", "objection_to", "problems_of"]


def objection(model: VideoModel) -> str | None:
    """Why tokens of `model` cannot be reduced at all, or None."""
    if model.token_grid is None:
        return f"the token grid of family {model.family!r} is not known"
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


def frames_at(model: VideoModel, section: TokenSection) -> dict[str, int | None]:
    """Frames of the raster in front of each block; None where there is no raster any more."""
    assert model.token_grid is not None
    frames: int | None = Layout(model.token_grid).num_frames
    left, result = section.num_patches, dict[str, int | None]()
    for name in model.token_blocks:
        result[name] = frames
        site = section.sites.get(name)
        if site is None or site.keep == left:
            continue
        raster = find_technique(site.technique, f"tokens.sites.{name}").raster
        if raster == "lost":
            frames = None
        elif raster == "frames" and frames is not None:
            frames = max(1, site.keep * frames // left)
        left = site.keep
    return result


def _site_problems(model: VideoModel, section: TokenSection) -> list[str]:
    assert model.token_grid is not None
    sequences, left = Layout(model.token_grid).sequences_per_clip, section.num_patches
    frames, problems = frames_at(model, section), []
    for name in model.token_blocks:
        site, where = section.sites.get(name), f"tokens.sites.{name}"
        if site is None:
            continue
        technique = find_technique(site.technique, where)
        reason = objection_to(model, site.technique)
        raster = frames[name]
        if reason is not None:
            problems.append(f"{where}: {site.technique} is not possible: {reason}")
        if site.keep > left:
            problems.append(
                f"{where}.keep must be at most {left}, the tokens there, got {site.keep}"
            )
        elif site.keep < left and technique.needs_attention and name == model.token_blocks[0]:
            problems.append(
                f"{where}: {site.technique} reads the attention of the block before; there is none"
            )
        elif site.keep < left and technique.needs_raster and raster is None:
            problems.append(
                f"{where}: {site.technique} needs frames with their places, which the reduction "
                "before has mixed"
            )
        least = technique.num_whole_frames * left // raster if raster else 0
        if site.keep < least:
            problems.append(
                f"{where}.keep must be at least {least}, since {site.technique} keeps the first "
                f"frame; got {site.keep}"
            )
        unit = _unit(technique.raster, sequences, raster, left)
        if site.keep % unit:
            problems.append(f"{where}.keep must be a multiple of {unit}, got {site.keep}")
        left = site.keep
    return problems


def _unit(raster: str, sequences: int, frames: int | None, left: int) -> int:
    """What the number of kept tokens has to be a multiple of."""
    if raster == "places" and frames is not None:
        return sequences * frames
    if raster == "frames" and frames is not None:
        return max(1, left // frames)
    return sequences
