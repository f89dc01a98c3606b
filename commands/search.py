"""Commands that measure a model and search: sensitivities, latencies, token schedules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from vcompress.commands.options import check_sources, common, load_options, model_options
from vcompress.spec.defaults import NUM_CLIPS
from vcompress.spec.target import TARGETS

__all__ = ["latency", "sensitivity", "tokens"]


@click.command()
@click.argument("model")
@click.option("--calib", metavar="PATH", help="Clips: a folder of videos, an .npz or a .pt file.")
@click.option(
    "--num-clips",
    default=NUM_CLIPS,
    show_default=True,
    type=click.IntRange(1),
    help="Calibration clips.",
)
@click.option(
    "--target",
    default="mixed",
    show_default=True,
    type=click.Choice(list(TARGETS)),
    help="Whose formats are compared.",
)
@click.option("--formats", metavar="A,B", help="Other formats than the target's.")
@click.option("--check", is_flag=True, help="Measure by brute force too, and compare. Slow.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of every random choice.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("sensitivity.png"),
    show_default=True,
    help="The plot.",
)
@model_options
@common
def sensitivity(
    model: str, formats: str | None, check: bool, output: Path, as_json: bool, quiet: bool,
    **values: Any,
) -> None:  # fmt: skip
    """What each layer of MODEL costs in each format: a table and a plot.

    Costs are predicted from a few gradients, in seconds; --check measures them.
    """
    check_sources(model, values)
    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    table = pipeline.sensitivity(
        model, options=pipeline.Options(**values), check=check, load=load, progress=console,
        formats=None if formats is None else tuple(re.split(r"\s*,\s*", formats.strip())),
        plot=output,
    )  # fmt: skip
    console.sensitivity(table, output)


@click.command()
@click.argument("model")
@click.option(
    "--formats", metavar="A,B", help="Default: all. Those without a kernel here get no time."
)
@click.option(
    "--calib", metavar="PATH", help="For a denoiser: a file of calls, for the shapes of its inputs."
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="Run the kernels of vcompress there, e.g. cuda. Default: ONNX Runtime, on the CPU.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("latency.json"),
    show_default=True,
    help="The table.",
)
@click.option("--force", is_flag=True, help="Replace a table that is already there.")
@model_options
@common
def latency(
    model: str, formats: str | None, calib: str | None, device: str | None, output: Path,
    force: bool, as_json: bool, quiet: bool, **values: Any,
) -> None:  # fmt: skip
    """Measure what each layer of MODEL takes here in each format, and write it as a table.

    Elsewhere, plan for this machine with quantize --target mixed --max-latency --latency-table.
    """
    check_sources(model, {"calib": calib})
    from dataclasses import replace

    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    if calib is not None:
        load = replace(load, calls=Path(calib))
    table = pipeline.measure_latency(
        model, output, load=load, progress=console, force=force, device=device,
        formats=None if formats is None else tuple(re.split(r"\s*,\s*", formats.strip())),
    )  # fmt: skip
    console.latency(table, output)


@click.command()
@click.argument("model")
@click.option("--calib", metavar="PATH", help="Clips: a folder of videos, an .npz or a .pt file.")
@click.option(
    "--num-clips",
    default=NUM_CLIPS,
    show_default=True,
    type=click.IntRange(1),
    help="Calibration clips. A drop is read off them: more clips, finer bars.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="At most so many of 100 clips may change their top class.",
)
@click.option("--min-sqnr", type=float, metavar="DB", help="The outputs' SQNR, at least.")
@click.option(
    "--max-flops",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Operations, as a share of those of MODEL.",
)
@click.option(
    "--max-latency",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Wall-clock time here in ONNX Runtime, as a share of that of MODEL.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Of every random choice.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("tokens.json"),
    show_default=True,
    help="The plan.",
)
@click.option("--force", is_flag=True, help="Replace a plan that is already there.")
@model_options
@common
def tokens(
    model: str, max_flops: float | None, max_latency: float | None, output: Path, as_json: bool,
    quiet: bool, **values: Any,
) -> None:  # fmt: skip
    """Find the token schedule of MODEL under one bar, and write it as a plan.

    Take it over with quantize --tokens PLAN, or run it alone with apply PLAN.
    """
    check_sources(model, values)
    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    found = pipeline.find_tokens(
        model, output, options=pipeline.Options(**values), max_flops=max_flops,
        max_latency=max_latency, load=load, progress=console,
    )  # fmt: skip
    console.tokens(found, output)
