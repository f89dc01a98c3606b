"""The report of a cache: where it reused, and what the clips look like, one self-contained page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vcompress.compress.cache import CacheReport
from vcompress.spec.errors import MissingCapabilityError
from vcompress.validate.frames import Frames

if TYPE_CHECKING:
    from vcompress.pipeline.cache import CacheFound

__all__ = ["hit_map", "side_by_side", "strip", "write_report"]

_SHOWN_FRAMES = 8
_MILLISECONDS_A_FRAME = 120
_LEAST_HEIGHT = 144
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c1c1c}img{max-width:100%;image-rendering:pixelated}td,th{padding:.2rem .8rem;"
    "text-align:right}td:first-child,th:first-child{text-align:left}.missed{color:#b00020}"
)


def write_report(found: CacheFound, path: Path) -> None:
    """Write the page to `path`.

    Raises:
        MissingCapabilityError: matplotlib or Pillow is not installed.
    """
    assert found.held_out is not None
    trial = found.held_out
    rows = "".join(
        f"<tr><td>{html.escape(case.name)}<td>{psnr:.2f}<td>{like:.4f}<td>{speed:.2f}x"
        for case, psnr, like, speed in zip(
            found.cases, trial.psnr_db, trial.ssim, found.speed, strict=True
        )
    )
    pictures = "".join(
        f"<h3>{html.escape(case.name)}: {psnr:.2f} dB</h3>"
        f"{_image(strip(full, clip), 'png', 'frames: full above, cached below')}"
        f"<p>{_image(side_by_side(full, clip), 'webp', 'video: full left, cached right')}"
        for case, full, clip, psnr in zip(
            found.cases, found.full, trial.clips, trial.psnr_db, strict=True
        )
    )
    families = "".join(
        f"<tr><td>{html.escape(one.name)}<td>-<td>-"
        if one.best is None
        else f"<tr><td>{html.escape(one.name)}<td>{one.best.report.skip_rate:.1%}"
        f"<td>{np.mean(one.best.psnr_db):.2f}"
        for one in found.families
    )
    verdict = "holds" if found.holds else "missed"
    notes = "".join(f"<li>{html.escape(note)}" for note in trial.report.notes)
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(found.name)}: cache</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(found.name)}: {trial.section.policy}</h1>"
        f"<p class={verdict}>Target {verdict}: {html.escape(found.reason)}.</p>"
        f"<p>{trial.report.skip_rate:.1%} of block calls reused over {found.num_steps} steps, "
        f"{trial.report.state_bytes / 2**20:.1f} MiB kept.</p><ul>{notes}</ul>"
        "<h2>Held-out clips</h2><table><tr><th>clip<th>PSNR dB<th>SSIM<th>speed-up"
        f"{rows}</table><h2>What was reused</h2>"
        f"{_image(hit_map(trial.report), 'png', 'hit rate by block and step')}"
        f"<h2>Full and cached</h2>{pictures}<h2>All families on the calibration clips</h2>"
        f"<table><tr><th>family<th>reused<th>PSNR dB{families}</table>"
    )
    path.write_text(page, encoding="utf-8")


def hit_map(report: CacheReport) -> bytes:
    """The share of reused calls, a row a block and a column a step, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "the map of a cache needs matplotlib: pip install matplotlib"
        raise MissingCapabilityError(message) from error
    rate = np.where(report.calls > 0, report.hits / np.maximum(report.calls, 1), np.nan)
    figure = Figure(figsize=(10, 1.6 + 0.18 * len(report.blocks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rate, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    every = max(1, len(report.blocks) // 20)
    axes.set_yticks(range(0, len(report.blocks), every), report.blocks[::every], fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(f"{report.policy}: share of calls reused, {report.skip_rate:.1%} in all")
    figure.colorbar(image, ax=axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def strip(full: Frames, candidate: Frames) -> bytes:
    """Frames in a row, of the full model above and of the cached one below, as PNG."""
    chosen = np.linspace(0, len(full) - 1, min(_SHOWN_FRAMES, len(full))).round().astype(int)
    rows = [np.concatenate(list(_pixels(clip[chosen])), axis=1) for clip in (full, candidate)]
    stream = io.BytesIO()
    _picture(np.concatenate(rows, axis=0)).save(stream, format="PNG")
    return stream.getvalue()


def side_by_side(full: Frames, candidate: Frames) -> bytes:
    """A looping video, the full model left and the cached one right, as animated WebP."""
    both = np.concatenate([_pixels(full), _pixels(candidate)], axis=2)
    scale = max(1, -(-_LEAST_HEIGHT // both.shape[1]))
    frames = [_picture(frame.repeat(scale, 0).repeat(scale, 1)) for frame in both]
    stream = io.BytesIO()
    frames[0].save(
        stream, format="WEBP", save_all=True, append_images=frames[1:],
        duration=_MILLISECONDS_A_FRAME, loop=0, lossless=True,
    )  # fmt: skip
    return stream.getvalue()


def _pixels(clip: Frames) -> NDArray[np.uint8]:
    """Three channels of 8 bits; the first channels of latents."""
    shown = clip[..., :3] if clip.shape[-1] >= 3 else clip[..., :1].repeat(3, axis=-1)
    pixels: NDArray[np.uint8] = (255 * shown).round().clip(0, 255).astype(np.uint8)
    return pixels


def _picture(pixels: NDArray[np.uint8]) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        message = "pictures of clips need Pillow: pip install pillow"
        raise MissingCapabilityError(message) from error
    return Image.fromarray(np.ascontiguousarray(pixels))


def _image(data: bytes, kind: str, text: str) -> str:
    coded = base64.b64encode(data).decode("ascii")
    return f'<img alt="{text}" src="data:image/{kind};base64,{coded}">'
