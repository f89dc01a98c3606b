"""The command that finds what a diffusion pipeline may use again from step to step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vcompress.commands.options import common
from vcompress.spec.errors import QualityGateError

__all__ = ["cache"]


@click.command()
@click.argument("pipeline_folder", metavar="PIPELINE")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="One prompt a line, or a .pt file with prompt_embeds. The reference has its own.",
)
@click.option("--min-psnr", type=float, metavar="DB", help="The target: PSNR of the clips.")
@click.option("--min-ssim", type=click.FloatRange(0, 1), metavar="SHARE", help="The same as SSIM.")
@click.option(
    "--num-clips",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Clips to calibrate on, and as many others that prove it.",
)
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(1),
    help="Denoising steps. Default: what PIPELINE does by itself.",
)
@click.option(
    "--size",
    nargs=3,
    type=click.IntRange(1),
    metavar="FRAMES HEIGHT WIDTH",
    help="Of the clips. Default: what PIPELINE does by itself.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Of the first clip.")
@click.option(
    "--features",
    metavar="MODEL",
    help="A recogniser whose features of held-out clips are compared as well.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("cache.json"),
    show_default=True,
    help="The plan; a report is written beside it.",
)
@click.option("--force", is_flag=True, help="Replace a plan that is already there.")
@common
def cache(pipeline_folder: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Find cache policy and settings of PIPELINE for a quality target, and prove them.

    PIPELINE is a folder of a diffusers pipeline or reference:bouncing-garments. Quality is that of
    generated clips against those of the full model from the same noise. Take the plan over with
    vcompress.cached(pipe, PLAN).
    """
    from vcompress.pipeline.cache import find_cache
    from vcompress.terminal.cache import print_cache
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    found = find_cache(pipeline_folder, progress=console, **values)
    print_cache(found, as_json=as_json)
    if not found.holds:
        message = f"{found.reason}; the plan is kept in {found.path}"
        raise QualityGateError(message)
