"""Commands that run a model on videos."""

from __future__ import annotations

from typing import Any

import click

from vcompress.commands.options import common, load_options, model_options
from vcompress.spec.defaults import MIN_AGREEMENT, NUM_CHECKS

__all__ = ["stream"]


@click.command()
@click.argument("model")
@click.argument("video")
@click.option(
    "--window", type=click.IntRange(1), metavar="FRAMES", help="Default: what MODEL takes."
)
@click.option(
    "--stride",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="FRAMES",
    help="New frames of each window, as MODEL sees them.",
)
@click.option(
    "--reuse",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "exact", "approximate", "none"]),
    help="What is kept from window to window: features of frames, to the same bits (exact), or "
    "answers while nothing changes (approximate, found on --calib).",
)
@click.option(
    "--calib", metavar="PATH", help="A folder of videos, for an approximate reuse and its proof."
)
@click.option(
    "--min-agreement",
    default=MIN_AGREEMENT,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Of approximate reuse: share of windows answered as by computing, on other videos.",
)
@click.option(
    "--checks",
    "num_checks",
    default=NUM_CHECKS,
    show_default=True,
    type=click.IntRange(0),
    help="Windows that are computed both ways, for the proof and the speed-up.",
)
@model_options
@common
def stream(model: str, video: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Answers of the recogniser MODEL over a sliding window of VIDEO, as they come.

    One line a window; with --json one object a line, the first and the last about the stream.
    """
    from vcompress.pipeline.stream import stream
    from vcompress.terminal.console import Console
    from vcompress.terminal.stream import print_stream

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    print_stream(stream(model, video, load=load, progress=console, **values), as_json=as_json)
