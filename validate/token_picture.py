"""A picture of which patches became one token: frames, and below them the same frames painted.

Shapes: T frames, H W rows and columns of pixels, C channels, h w rows and columns of patches.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.validate.token_paint import Frames, Paint, Places

__all__ = ["TokenMap", "draw_token_picture", "require_matplotlib"]

_MAX_FRAMES = 16
_MAX_COLUMNS = 8
# Pixels: of the picture, of a frame that was made larger, of one that was made smaller, of a patch.
_MAX_WIDTH, _MAX_SCALED, _MAX_SHRUNK, _MIN_CELL = 2300, 288, 576, 8
_DPI = 100
_GAP, _MARGIN, _LABEL_COLUMN, _LABEL_ROW, _BAND_GAP, _HEAD, _FOOT = 8, 20, 132, 22, 26, 52, 40
_USABLE = _MAX_WIDTH - _LABEL_COLUMN - 2 * _MARGIN
_INK, _FAINT = "#1c1f24", "#5c6570"


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """Where every patch is at one point of the model.

    Attributes:
        label: beside the row, one or more short lines.
        origin: `[T, h, w]`, patches with the same number are one token; -1 for dropped ones.
    """

    label: str
    origin: Places


def draw_token_picture(
    frames: Frames, maps: Sequence[TokenMap], *, title: str, frame_labels: Sequence[str], path: Path
) -> None:
    """Draw `frames`, and below them the same with each of `maps`, into the PNG `path`.

    Of more than 16 frames, 16 that lie evenly are shown.

    Args:
        frames: `[T, H, W, C]`, gray or RGB.
        maps: at least one, in the order of the model; the caption describes the last.
        title: one line.
        frame_labels: T short texts.

    Raises:
        InputError: shapes do not fit.
        MissingCapabilityError: matplotlib is not installed.
    """
    _check(frames, maps, frame_labels)
    require_matplotlib()
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MAX_FRAMES)).astype(int))
    rows, columns = maps[0].origin.shape[1:]
    cells = _cell_size(frames.shape[1:3], (rows, columns), min(len(shown), _MAX_COLUMNS))
    large = [_resized(frames[index], (rows * cells[0], columns * cells[1])) for index in shown]
    painted: list[list[Frames]] = [large]
    for each in maps:
        paint = Paint.of(frames, each.origin)
        painted.append([
            paint.on(picture, index) for picture, index in zip(large, shown, strict=True)
        ])  # fmt: skip
    _write(
        painted,
        row_labels=["input", *(each.label for each in maps)],
        frame_labels=[frame_labels[index] for index in shown],
        title=title,
        caption=_caption(maps[-1].origin),
        path=path,
    )


def require_matplotlib() -> None:
    """Raise `MissingCapabilityError` where it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = "the picture needs matplotlib: pip install 'vcompress-ai[plots]'"
        raise MissingCapabilityError(message) from error


def _check(frames: Frames, maps: Sequence[TokenMap], frame_labels: Sequence[str]) -> None:
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[3] not in (1, 3):
        message = (
            f"frames must be uint8 [T, H, W, 1 or 3], got {frames.dtype} of {list(frames.shape)}"
        )
        raise InputError(message)
    shapes = {each.origin.shape for each in maps}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] != len(frames):
        message = (
            f"maps must be alike and [T, h, w] for {len(frames)} frames, got "
            f"{[list(each.origin.shape) for each in maps]}"
        )
        raise InputError(message)
    if len(frame_labels) != len(frames):
        message = f"{len(frames)} frames need as many labels, got {len(frame_labels)}"
        raise InputError(message)


def _cell_size(frame: tuple[int, int], grid: tuple[int, int], side_by_side: int) -> tuple[int, int]:
    """Pixels of a drawn patch: those of the model's times the largest whole number that fits.

    Args:
        frame, grid: rows and columns, in pixels and in patches.
        side_by_side: frames in a row.
    """
    room = min(_MAX_SCALED, _USABLE // side_by_side - _GAP)
    patch = [max(1, size // count) for size, count in zip(frame, grid, strict=True)]
    largest = max(side * count for side, count in zip(patch, grid, strict=True))
    times = max(1, room // largest, -(-_MIN_CELL // min(patch)))
    shrink = max(1, -(-largest // _MAX_SHRUNK))
    height, width = (max(_MIN_CELL, side * times // shrink) for side in patch)
    return height, width


def _resized(frame: Frames, size: tuple[int, int]) -> Frames:
    """`frame` `[H, W, C]` as RGB of `size`; whole multiples keep their pixels sharp."""
    from PIL import Image

    rgb = np.ascontiguousarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))
    picture = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(picture, np.uint8)


def _caption(origin: Places) -> str:
    sizes = Counter(origin[origin >= 0].tolist()).values()
    merged = [size for size in sizes if size > 1]
    dropped = int((origin < 0).sum())
    parts = []
    if merged:
        span = f"{min(merged)}" if min(merged) == max(merged) else f"{min(merged)} to {max(merged)}"
        parts.append(
            f"outlined: {_counted(len(merged), 'token')} of {span} patches, in their mean colour"
        )
    if len(sizes) > len(merged):
        alone = _counted(len(sizes) - len(merged), "patch", "patches")
        parts.append(f"as in the input: {alone} that nothing was merged with")
    if dropped:
        parts.append(f"dark: {_counted(dropped, 'patch', 'patches')} dropped")
    return "      ".join(parts)


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _write(
    painted: list[list[Frames]], *, row_labels: Sequence[str], frame_labels: Sequence[str],
    title: str, caption: str, path: Path,
) -> None:  # fmt: skip
    """Lay out the rows of pictures, in bands of so many frames as fit side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = painted[0][0].shape[:2]
    count = len(frame_labels)
    fitting = max(1, _USABLE // (width + _GAP))
    num_bands = -(-count // min(_MAX_COLUMNS, fitting))
    columns = -(-count // num_bands)
    band = _LABEL_ROW + len(painted) * (height + _GAP) + _BAND_GAP
    size = (
        max(2 * _MARGIN + _LABEL_COLUMN + columns * (width + _GAP) - _GAP, 900),
        _HEAD + num_bands * band - _BAND_GAP - _GAP + _FOOT,
    )
    figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, room: float, **style: Any) -> None:
        # A file name is no formula, whatever dollar signs it has.
        written = figure.text(
            x / size[0], 1 - y / size[1], text, va="center", parse_math=False, **style
        )
        if (wide := written.get_window_extent().width) > room:
            written.set_fontsize(style["fontsize"] * room / wide)

    line = size[0] - 2 * _MARGIN
    write(_MARGIN, _HEAD / 2, title, line, fontsize=12.5, color=_INK, weight="bold")
    write(_MARGIN, size[1] - _FOOT / 2, caption, line, fontsize=9, color=_FAINT)
    for index, label in enumerate(frame_labels):
        left = _MARGIN + _LABEL_COLUMN + index % columns * (width + _GAP)
        top = _HEAD + index // columns * band
        style: dict[str, Any] = {"fontsize": 8, "ha": "center", "color": _FAINT}
        write(left + width / 2, top + _LABEL_ROW / 2, label, width, **style)
        for row, pictures in enumerate(painted):
            y = top + _LABEL_ROW + row * (height + _GAP)
            figure.figimage(pictures[index], left, size[1] - y - height, origin="upper")
            if index % columns == 0:
                style = {"fontsize": 9, "color": _INK, "linespacing": 1.5}
                write(_MARGIN, y + height / 2, row_labels[row], _LABEL_COLUMN - _GAP, **style)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
