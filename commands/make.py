"""Commands that make something: a plan, an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vcompress.commands.options import (
    bar_options,
    check_sources,
    common,
    load_options,
    model_options,
    plan_options,
    proof_options,
)
from vcompress.spec.errors import QualityGateError
from vcompress.spec.target import TARGETS

if TYPE_CHECKING:
    from vcompress.pipeline import Outcome

__all__ = ["EXAMPLES", "apply", "demo", "plan", "quantize"]

EXAMPLES = """\b
Examples:
  vcompress demo
  vcompress quantize model.pt --target nvfp4 --calib clips/ --output out/
  vcompress quantize videomae/ --target int8 --calib clips/ --data labelled/ --max-drop 1.0
"""


@click.command(epilog=EXAMPLES)
@click.argument("model")
@plan_options
@proof_options
@model_options
@common
def quantize(model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Plan, apply, export, build and prove: the whole job for MODEL.

    MODEL is a .pt, .safetensors, .onnx or .pt2 file, a directory saved by transformers or
    diffusers, MODULE:CALLABLE, or reference:NAME (penvideo20, moving-fashion, bouncing-garments).
    For a denoiser, --calib is a file of calls made with vcompress.record_calls.
    """
    check_sources(model, values)
    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    outcome = pipeline.quantize(
        model, load=load, options=pipeline.Options(**values), progress=console
    )
    _finish(outcome, console)


@click.command()
@click.argument("model")
@plan_options
@bar_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("plan.json"), show_default=True
)
@click.option("--force", is_flag=True, help="Replace a plan that is already there.")
@model_options
@common
def plan(model: str, output: Path, as_json: bool, quiet: bool, **values: Any) -> None:
    """Decide only: write the plan of MODEL, one layer a line, to be read and edited."""
    check_sources(model, values)
    from vcompress import pipeline
    from vcompress.terminal.console import Console
    from vcompress.terminal.inspection import print_plan

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    made = pipeline.write_plan(
        model, output, load=load, options=pipeline.Options(**values), progress=console
    )
    print_plan(console, made, output)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("model")
@click.option(
    "--calib", metavar="PATH", help="Only for the golden clips and the held-out test clips."
)
@proof_options
@model_options
@common
def apply(plan_file: Path, model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Execute exactly PLAN on MODEL, then export, build and prove."""
    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = load_options(values)
    outcome = pipeline.apply(
        model, plan_file, load=load, options=pipeline.Options(**values), progress=console
    )
    _finish(outcome, console)


@click.command()
@click.option("--target", type=click.Choice(list(TARGETS)), default="nvfp4", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("vcompress-demo"),
    show_default=True,
)
@common
def demo(target: str, output: Path, as_json: bool, quiet: bool) -> None:
    """Compress a recogniser that ships with vcompress. Needs no file and no network."""
    from vcompress import pipeline
    from vcompress.terminal.console import Console

    console = Console(as_json=as_json, quiet=quiet)
    source = "reference:penvideo20"
    # Enough clips to certify a drop below one point, few enough to end within a minute.
    options = pipeline.Options(
        target=target, calib=source, output=output, num_test_clips=500, force=True
    )
    _finish(pipeline.quantize(source, options=options, progress=console), console)


def _finish(outcome: Outcome, console: Any) -> None:
    console.outcome(outcome)
    if outcome.verdict.outcome == "fail":
        message = f"{outcome.verdict.reason}; the artifact is kept in {outcome.path}"
        raise QualityGateError(message)
