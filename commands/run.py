"""Commands that run a model or an artifact on videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vcompress.commands.options import check_sources, common, load_options, model_options
from vcompress.spec.defaults import MIN_AGREEMENT, NUM_CHECKS
from vcompress.spec.errors import InputError

__all__ = ["run", "stream"]


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
    check_sources(model, values)
    from vcompress.pipeline.stream import stream
    from vcompress.terminal.console import Console
    from vcompress.terminal.stream import print_stream

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    print_stream(stream(model, video, load=load, progress=console, **values), as_json=as_json)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("videos", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    default="onnxruntime",
    show_default=True,
    metavar="NAME",
    help="What runs it; an unknown name lists all.",
)
@click.option(
    "--provider",
    metavar="NAME",
    help="Execution provider or device, in the runtime's words. It must really be used. "
    "Default: the CPU.",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    metavar="FRAMES",
    help="Answer over a sliding window, so many frames further each time. Default: one answer a "
    "video.",
)
@click.option(
    "--batch", default=1, show_default=True, type=click.IntRange(1), help="Clips in one run."
)
@click.option(
    "--top", default=1, show_default=True, type=click.IntRange(1, 5), help="Classes that are shown."
)
@click.option(
    "--arrays", type=click.Path(path_type=Path), metavar="NPZ", help="Write all outputs there."
)
@click.option("--check", is_flag=True, help="First run the golden clips; stop where they differ.")
@click.option("--threads", type=click.IntRange(1), help="On the CPU. Default: all cores.")
@common
def run(
    artifact: Path, videos: tuple[Path, ...], runtime: str, provider: str | None,
    stride: int | None, batch: int, top: int, arrays: Path | None, check: bool,
    threads: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Answers of ARTIFACT on VIDEOS, files or folders. Needs no torch: NumPy, PyAV and a runtime.

    One line an answer, with --json one object a line.
    """
    from vcompress.export.deployed import open_deployed
    from vcompress.spec.files import check_file
    from vcompress.terminal.deployed import AnswerPrinter, save_arrays

    if arrays is not None:
        check_file(arrays, "--arrays")
    deployed = open_deployed(artifact, runtime=runtime, provider=provider, threads=threads)
    printer = AnswerPrinter(deployed, as_json=as_json, quiet=quiet, num_top=top)
    printer.start(deployed.check() if check else None)
    videos = _files_of(videos, printer.skip)
    if stride is None:
        answers = deployed.answers(videos, batch=batch, skipped=printer.skip)
    else:
        answers = deployed.windows(videos, stride=stride, batch=batch, skipped=printer.skip)
    done = printer.answers(answers)
    if arrays is not None:
        save_arrays(done, arrays)
    if printer.skipped:
        message = (
            f"{len(printer.skipped)} of {len(videos)} videos could not be used to their end: "
            f"{', '.join(printer.skipped)}; see the warnings"
        )
        raise InputError(message)


def _files_of(
    videos: tuple[Path, ...], skip: Callable[[str, InputError], None]
) -> tuple[Path, ...]:
    """`videos` with folders taken apart; `skip` is told what is no readable video in them."""
    from vcompress.calib.folder import find_videos

    files: list[Path] = []
    for path in videos:
        if not path.is_dir():
            files.append(path)
            continue
        found = find_videos(path)
        files += [path / video for video in found.videos]
        for name, reason in found.skipped:
            message = f"{path / name}: {reason}"
            skip(str(path / name), InputError(message))
    return tuple(files)
