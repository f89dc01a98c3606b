"""The report of a cache: what it is worth, what the clips look like, and where it reused.

One self-contained page in the style of the report of an artifact; see `validate.html`.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import vcompress
from vcompress.compress.cache import CacheReport
from vcompress.pipeline.cache_search import Trial
from vcompress.spec.errors import MissingCapabilityError
from vcompress.spec.files import replace_file
from vcompress.validate.frames import Frames, flicker_percent, motion_error_px
from vcompress.validate.html import render_page
from vcompress.validate.latency import describe_device

if TYPE_CHECKING:
    from vcompress.pipeline.cache import CacheFound

__all__ = [
    "AMPLIFIED", "hit_map", "lowest", "picture", "rate_map", "side_by_side", "strip",
    "write_report",
]  # fmt: skip

# How much larger a difference is shown than it is.
AMPLIFIED = 8
_SHOWN_FRAMES = 8
_MILLISECONDS_A_FRAME = 120
_LEAST_HEIGHT = 144
_LEVELS = 10
_ROW_PIXELS = (8, 26)
_MAP_PIXELS = 320
# Of the settings, long lists that say nothing to a person.
_FITTED = ("blocks", "mixture", "magnitudes", "coefficients")
_METRICS = {"psnr_db": ("PSNR", " dB"), "ssim": ("SSIM", "")}


def write_report(found: CacheFound, path: Path, *, code: str | None = None) -> None:
    """Write the page to `path`; `code` is how it is taken over, if not as a plan.

    Raises:
        MissingCapabilityError: Jinja2 or Pillow is not installed.
    """
    view = _view(found)
    if code is not None:
        view["code"] = code
    replace_file(path, render_page("cache.html.j2", view))


def _view(found: CacheFound) -> dict[str, Any]:
    """Texts, positions and pictures of the page."""
    trial = found.held_out
    assert trial is not None
    assert found.section is not None
    what, unit = _METRICS[found.bar.metric]
    target = f"{what} of {found.bar.least:g}{unit}"
    quantized = " over quantized layers" if found.alone else ""
    seen = "a clip" if len(found.cases) == 1 else f"{len(found.cases)} clips"
    return {
        "title": f"{found.name} \u2192 {trial.section.policy.replace('_', ' ')} cache{quantized}",
        "page": "cache report", "result": "compressed" if found.alone else "cached",
        "words": {"reached": "reused", "rest": "computed", "where": "What was reused"},
        "version": vcompress.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": {
            "word": "Holds" if found.holds else "Missed",
            "symbol": "\u2713" if found.holds else "\u2715",
            "kind": "pass" if found.holds else "fail",
            "reason": f"A mean {target} was asked for; on {seen} that the search never saw it is "
            f"{np.mean(trial.values(found.bar.metric)):.4g}{unit}.",
        },
        "tiles": _tiles(found, trial),
        "notes": list(trial.report.notes),
        "amplified": AMPLIFIED,
        "clips": [
            {
                "name": case.name, "psnr": f"{psnr:.2f}", "ssim": f"{like:.4f}",
                "speed": f"{speed:.2f}\u00d7",
                "video": picture(side_by_side(full, clip, difference=True)),
                "frames": picture(strip(full, clip, difference=True)),
            }
            for case, full, clip, psnr, like, speed in zip(
                found.cases, found.full, trial.clips, trial.psnr_db, trial.ssim, found.speed,
                strict=True,
            )
        ],
        "map": rate_map(
            _rate(trial.report), trial.report.blocks,
            f"{trial.report.skip_rate:.1%} of {int(trial.report.calls.sum()):,} calls were reused",
        ),
        "families": [
            {
                "name": one.name, "tried": one.num_trials,
                "chosen": one.best is not None and one.best.section == found.section,
                "reused": one.best and f"{one.best.report.skip_rate:.1%}",
                "psnr": one.best and f"{np.mean(one.best.psnr_db):.2f}",
                "ssim": one.best and f"{np.mean(one.best.ssim):.4f}",
            }
            for one in found.families
        ],
        "code": f'handle = vcompress.cached(pipe, "{found.path or "cache.json"}")',
        "facts": _facts(found),
    }  # fmt: skip


def lowest(values: Sequence[float], form: str) -> str:
    """What a mean is of, and how low it gets."""
    if len(values) == 1:
        return "of one held-out clip"
    return f"mean of {len(values)} held-out clips, lowest {min(values):{form}}"


def _tiles(found: CacheFound, trial: Trial) -> list[dict[str, str]]:
    alone = [] if not found.alone else [
        {"label": "PSNR of precision alone", "value": f"{np.mean(found.alone):.2f}", "unit": "dB",
         "note": f"the quantized layers with every step computed, lowest {min(found.alone):.2f}"}
    ]  # fmt: skip
    what = "the quantized layers without and with the cache" if found.alone else "full and cached"
    return [
        {"label": "PSNR", "value": f"{np.mean(trial.psnr_db):.2f}", "unit": "dB",
         "note": lowest(trial.psnr_db, ".2f")},
        {"label": "SSIM", "value": f"{np.mean(trial.ssim):.4f}", "unit": "",
         "note": lowest(trial.ssim, ".4f")},
        {"label": "Reused", "value": f"{100 * trial.report.skip_rate:.1f}", "unit": "%",
         "note": f"of block calls over {found.num_steps} steps; "
         f"{trial.report.state_bytes / 2**20:.1f} MiB kept"},
        {"label": "Speed", "value": f"{np.mean(found.speed):.2f}\u00d7", "unit": "",
         "note": f"wall clock here, {what} in turn"},
        *alone,
    ]  # fmt: skip


def _over_time(found: CacheFound) -> dict[str, str]:
    """What PSNR and SSIM, which look at one frame at a time, do not see; means over the clips."""
    assert found.held_out is not None
    pairs = list(zip(found.full, found.held_out.clips, strict=True))
    motion = [motion_error_px(*pair) for pair in pairs]
    known = [each for each in motion if each is not None]
    return {
        "flicker": f"{np.mean([flicker_percent(*pair) for pair in pairs]):.2f} % of the range",
        **(
            {}
            if found.feature_distances is None
            else {"feature distance": f"{np.mean(found.feature_distances):.4f}"}
        ),
        "motion error": f"{np.mean(known):.3f} px a frame" if known
        else "not known: nothing moves, or scikit-image is not installed",
    }  # fmt: skip


def _facts(found: CacheFound) -> list[dict[str, Any]]:
    assert found.section is not None
    settings = found.section.as_dict()
    shown = {
        name: ", ".join(f"{each:.4g}" for each in value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name not in _FITTED and value not in (None, [])
    }
    device = describe_device(torch.get_num_threads())
    groups = {
        "Frames": _over_time(found),
        "Settings": shown,
        "Machine": {
            "cpu": device["cpu"], "threads": device["num_threads"],
            "load average 1min": device["load_average_1min"],
        },
        "Versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    return [
        {
            "title": title,
            "rows": [{"key": key.replace("_", " "), "value": str(value)}
                     for key, value in rows.items()],
        }
        for title, rows in groups.items()
    ]  # fmt: skip


def rate_map(rate: NDArray[np.float64], blocks: Sequence[str], what: str) -> dict[str, Any]:
    """Shares `[blocks, steps]`, a row a block and a column a step, as paths of one shade each."""
    num_blocks, num_steps = rate.shape
    levels = np.round(_LEVELS * rate)
    drawn = []
    for level in (0, *range(1, _LEVELS + 1)):
        rows, columns = np.nonzero(levels == level)
        path = "".join(
            f"M{step}.05 {block}.08h.9v.84h-.9z" for block, step in zip(rows, columns, strict=True)
        )
        if path:
            opacity = 1 if level in (0, _LEVELS) else round(level / _LEVELS, 2)
            drawn.append({"reached": level > 0, "opacity": opacity, "path": path})
    least, most = _ROW_PIXELS
    every = max(1, num_steps // 10)
    return {
        "about": f"A row a block, from {blocks[0]} above to {blocks[-1]} below; a column a step: "
        f"{what}.",
        "width": num_steps, "height": num_blocks, "levels": drawn,
        "pixels": num_blocks * min(most, max(least, _MAP_PIXELS // num_blocks)),
        "ticks": [
            {"at": round(100 * (step + 0.5) / num_steps, 2), "text": str(step)}
            for step in range(0, num_steps, every)
        ],
    }  # fmt: skip


def _rate(report: CacheReport) -> NDArray[np.float64]:
    """The share of reused calls `[blocks, steps]`; nan where the model never came."""
    return np.where(report.calls > 0, report.hits / np.maximum(report.calls, 1), np.nan)


def hit_map(report: CacheReport) -> bytes:
    """The share of reused calls, a row a block and a column a step, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "the map of a cache needs matplotlib: pip install matplotlib"
        raise MissingCapabilityError(message) from error
    figure = Figure(figsize=(10, 1.6 + 0.18 * len(report.blocks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(_rate(report), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    every = max(1, len(report.blocks) // 20)
    axes.set_yticks(range(0, len(report.blocks), every), report.blocks[::every], fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(f"{report.policy}: share of calls reused, {report.skip_rate:.1%} in all")
    figure.colorbar(image, ax=axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def strip(full: Frames, candidate: Frames, *, difference: bool = False) -> bytes:
    """Frames in a row, of the full model above and of the cached one below, as PNG.

    Args:
        difference: the amplified difference stands below them.
    """
    chosen = np.linspace(0, len(full) - 1, min(_SHOWN_FRAMES, len(full))).round().astype(int)
    rows = [
        np.concatenate(list(clip[chosen]), axis=1)
        for clip in _shown(full, candidate, difference=difference)
    ]
    stream = io.BytesIO()
    _image(np.concatenate(rows, axis=0)).save(stream, format="PNG")
    return stream.getvalue()


def side_by_side(full: Frames, candidate: Frames, *, difference: bool = False) -> bytes:
    """A looping video, the full model left and the cached one right, as animated WebP.

    Args:
        difference: the amplified difference stands to the right of them.
    """
    together = np.concatenate(_shown(full, candidate, difference=difference), axis=2)
    scale = max(1, -(-_LEAST_HEIGHT // together.shape[1]))
    frames = [_image(frame.repeat(scale, 0).repeat(scale, 1)) for frame in together]
    stream = io.BytesIO()
    frames[0].save(
        stream, format="WEBP", save_all=True, append_images=frames[1:],
        duration=_MILLISECONDS_A_FRAME, loop=0, lossless=True,
    )  # fmt: skip
    return stream.getvalue()


def _shown(full: Frames, candidate: Frames, *, difference: bool) -> list[NDArray[np.uint8]]:
    clips = [_pixels(full), _pixels(candidate)]
    if difference:
        clips.append(_pixels(0.5 + AMPLIFIED * (candidate - full)))
    return clips


def _pixels(clip: Frames) -> NDArray[np.uint8]:
    """Three channels of 8 bits; the first channels of latents."""
    shown = clip[..., :3] if clip.shape[-1] >= 3 else clip[..., :1].repeat(3, axis=-1)
    pixels: NDArray[np.uint8] = (255 * shown).round().clip(0, 255).astype(np.uint8)
    return pixels


def _image(pixels: NDArray[np.uint8]) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        message = "pictures of clips need Pillow: pip install pillow"
        raise MissingCapabilityError(message) from error
    return Image.fromarray(np.ascontiguousarray(pixels))


def picture(data: bytes) -> dict[str, Any]:
    """A picture in the page, and its size, so that the page does not jump."""
    from PIL import Image

    width, height = Image.open(io.BytesIO(data)).size
    return {"data": base64.b64encode(data).decode("ascii"), "width": width, "height": height}
