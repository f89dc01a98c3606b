"""The command line: parsing and printing only. Everything else is `vcompress.pipeline`.

Standard output carries the result, standard error everything else. Exit codes: 0 done and all
gates passed, 1 a bug in vcompress, 2 wrong usage or input, 3 the quality bar was missed, 5 this
machine cannot do it, 6 export or build failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vcompress
from vcompress.cli_options import bar_options, common, model_options, plan_options, proof_options
from vcompress.spec.defaults import NUM_CLIPS
from vcompress.spec.errors import QualityGateError, VcompressError
from vcompress.spec.target import TARGETS

if TYPE_CHECKING:
    from vcompress.models.load import LoadOptions
    from vcompress.pipeline import Outcome

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  vcompress demo
  vcompress quantize model.pt --target nvfp4 --calib clips/ --output out/
  vcompress quantize videomae/ --target int8 --calib clips/ --data labelled/ --max-drop 1.0
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXAMPLES,
)
@click.version_option(vcompress.__version__, prog_name="vcompress")
def cli() -> None:
    """Compress a trained video model and prove what it can still do."""


def _load_options(values: dict[str, Any]) -> LoadOptions:
    from vcompress.models.load import LoadOptions

    names = ("arch", "input_spec", "trust_pickle", "clip_stride", "fps", "mean", "std", "task")
    return LoadOptions(**{name: values.pop(name) for name in names})


@cli.command(epilog=_EXAMPLES)
@click.argument("model")
@plan_options
@proof_options
@model_options
@common
def quantize(model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Plan, apply, export, build and prove: the whole job for MODEL.

    MODEL is a .pt or .safetensors file, a directory saved by transformers, MODULE:CALLABLE,
    reference:penvideo20 or reference:moving-fashion.
    """
    from vcompress import pipeline
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = _load_options(values)
    outcome = pipeline.quantize(
        model, load=load, options=pipeline.Options(**values), progress=console
    )
    _finish(outcome, console)


@cli.command()
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
    from vcompress import pipeline
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = _load_options(values)
    made = pipeline.write_plan(
        model, output, load=load, options=pipeline.Options(**values), progress=console
    )
    console.plan(made, output)


@cli.command()
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
    from vcompress import pipeline
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = _load_options(values)
    table = pipeline.sensitivity(
        model, options=pipeline.Options(**values), check=check, load=load, progress=console,
        formats=None if formats is None else tuple(re.split(r"\s*,\s*", formats.strip())),
        plot=output,
    )  # fmt: skip
    console.sensitivity(table, output)


@cli.command()
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
    from vcompress import pipeline
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = _load_options(values)
    found = pipeline.find_tokens(
        model, output, options=pipeline.Options(**values), max_flops=max_flops,
        max_latency=max_latency, load=load, progress=console,
    )  # fmt: skip
    console.tokens(found, output)


@cli.command()
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
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    load = _load_options(values)
    outcome = pipeline.apply(
        model, plan_file, load=load, options=pipeline.Options(**values), progress=console
    )
    _finish(outcome, console)


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", metavar="PATH", help="Other test clips than those of the report.")
@click.option(
    "--max-drop", type=click.FloatRange(0), metavar="POINTS", help="Default: the bar of the report."
)
@common
def validate(
    artifact: Path, data: str | None, max_drop: float | None, as_json: bool, quiet: bool
) -> None:
    """Run the proof of ARTIFACT again: hashes, golden clips, test clips, the bar."""
    from vcompress.pipeline import revalidate
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    result = revalidate.validate(artifact, data=data, max_drop=max_drop, progress=console)
    console.validation(result)
    if not result.passed:
        raise QualityGateError(result.reason)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    "clip",
    metavar="CLIP",
    help="Draw which patches of a video, or of the first clip of an .npz or .pt file, are merged.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The picture. Default: tokens.png."
)
@click.option(
    "--model", metavar="MODEL", help="For the picture. Default: what the artifact was made from."
)
@common
def inspect(
    file: Path, clip: str | None, output: Path | None, model: str | None, as_json: bool, quiet: bool
) -> None:
    """What FILE is (an artifact, a plan or an ONNX file): per layer, what was decided and why.

    With --tokens, a picture of what the plan in FILE does to the patches of CLIP.
    """
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    if clip is None:
        if output is not None or model is not None:
            message = "--output and --model are for the picture: add --tokens CLIP"
            raise click.UsageError(message)
        console.inspect(file)
        return
    from vcompress.pipeline.tokens_view import view_tokens

    output = output or Path("tokens.png")
    console.token_view(view_tokens(file, clip, output, source=model, progress=console), output)


@cli.command()
@common
def doctor(as_json: bool, quiet: bool) -> None:
    """What this machine can build, run and only simulate."""
    from vcompress.export.capabilities import capabilities
    from vcompress.terminal import Console

    Console(as_json=as_json, quiet=quiet).capabilities(capabilities())


@cli.command()
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
    from vcompress.terminal import Console

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


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed; elsewhere this does nothing.

    Activations are buffers of megabytes, which glibc gives back to the kernel at every free and
    takes again, zeroed, at the next layer: up to half of the time of a run on a CPU.
    """
    import ctypes

    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main() -> None:
    """Run the command line and end the process with the documented exit code."""
    _keep_freed_memory()
    code, message = _run()
    if message is not None:
        if "--json" in sys.argv and code != 3:
            # A gate's failure has already printed its report.
            print(json.dumps({"schema": 1, "exit_code": code, "error": message}))
        click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _run() -> tuple[int, str | None]:
    try:
        cli.main(standalone_mode=False)
    except VcompressError as error:
        return error.exit_code, str(error)
    except click.exceptions.Exit as error:
        return error.exit_code, None
    except click.ClickException as error:
        if "--json" in sys.argv:
            return error.exit_code, error.format_message()
        error.show()
        return error.exit_code, None
    except (click.exceptions.Abort, KeyboardInterrupt):
        return 130, "interrupted"
    except Exception as error:
        if os.environ.get("VCOMPRESS_DEBUG"):
            raise
        return 1, (
            f"a bug in vcompress: {type(error).__name__}: {error}; please report it with the "
            "output of the same command under VCOMPRESS_DEBUG=1"
        )
    return 0, None


if __name__ == "__main__":
    main()
