"""The command line: parsing and printing only. Everything else is `vcompress.pipeline`.

Standard output carries the result, standard error everything else. Exit codes: 0 done and all
gates passed, 1 a bug in vcompress, 2 wrong usage or input, 3 the quality bar was missed, 5 this
machine cannot do it, 6 export or build failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import vcompress
from vcompress.spec.defaults import MAX_LAYER_ERROR, NUM_CLIPS, NUM_TEST_CLIPS
from vcompress.spec.errors import QualityGateError, VcompressError
from vcompress.spec.target import TARGETS

if TYPE_CHECKING:
    from vcompress.models.load import LoadOptions
    from vcompress.pipeline import Outcome

__all__ = ["main"]

_F = TypeVar("_F", bound=Callable[..., Any])
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


def _with_options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """One decorator out of several, which `--help` lists in this order."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_common = _with_options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on standard error."),
)

_model_options = _with_options(
    click.option(
        "--arch",
        metavar="MODULE:CALLABLE",
        help="Builds the architecture of a bare state dict.",
    ),
    click.option(
        "--input-spec",
        metavar="LAYOUT:TYPE:SIZES",
        help="Input of a model that no adapter knows, e.g. NCTHW:float32:1x3x16x112x112.",
    ),
    click.option(
        "--trust-pickle", is_flag=True, help="Unpickle whole modules. Runs code from the file."
    ),
    click.option("--clip-stride", type=click.IntRange(1), help="Take every n-th frame of a video."),
    click.option("--fps", type=float, help="Resample videos to this frame rate first."),
    click.option(
        "--task",
        type=click.Choice(["classify", "embed", "restore", "generic"]),
        help="What the output means, where the model does not say.",
    ),
)

_plan_options = _with_options(
    click.option(
        "--target", required=True, type=click.Choice(list(TARGETS)), help="The deployment."
    ),
    click.option(
        "--calib",
        metavar="PATH",
        help="Clips to calibrate on: a folder of videos, an .npz or a .pt file.",
    ),
    click.option(
        "--num-clips",
        default=NUM_CLIPS,
        show_default=True,
        type=click.IntRange(1),
        help="Calibration clips.",
    ),
    click.option(
        "--tokens",
        type=float,
        metavar="RATIO",
        help="Merge tokens: mean share that a block keeps, e.g. 0.7.",
    ),
    click.option(
        "--algorithm",
        default="max",
        show_default=True,
        type=click.Choice(["max", "modelopt-max", "smoothquant", "awq"]),
        help="How inputs are calibrated; all but max use modelopt.",
    ),
    click.option(
        "--max-layer-error",
        default=MAX_LAYER_ERROR,
        show_default=True,
        type=float,
        help="Error of a block's output that one layer may cause before it gets more bits.",
    ),
    click.option("--seed", default=0, show_default=True, type=int, help="Of every random choice."),
)

_proof_options = _with_options(
    click.option(
        "--data",
        metavar="PATH",
        help="Test clips, in folders by class. Default: a held-out part of --calib.",
    ),
    click.option(
        "--num-test-clips",
        default=NUM_TEST_CLIPS,
        show_default=True,
        type=click.IntRange(1),
        help="Test clips, at most.",
    ),
    click.option(
        "--max-drop",
        type=click.FloatRange(0),
        metavar="POINTS",
        help="Exit with 3 if top-1 drops more. Default: 1.0 if the clips have labels.",
    ),
    click.option(
        "--min-sqnr", type=float, metavar="DB", help="Exit with 3 if the outputs' SQNR is lower."
    ),
    click.option(
        "--engine/--no-engine",
        default=True,
        show_default=True,
        help="Build the TensorRT-RTX engine.",
    ),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: NAME-TARGET/."),
    click.option("--force", is_flag=True, help="Replace an artifact that is already there."),
)


def _load_options(values: dict[str, Any]) -> LoadOptions:
    from vcompress.models.load import LoadOptions

    names = ("arch", "input_spec", "trust_pickle", "clip_stride", "fps", "task")
    return LoadOptions(**{name: values.pop(name) for name in names})


@cli.command(epilog=_EXAMPLES)
@click.argument("model")
@_plan_options
@_proof_options
@_model_options
@_common
def quantize(model: str, as_json: bool, quiet: bool, **values: Any) -> None:
    """Plan, apply, export, build and prove: the whole job for MODEL.

    MODEL is a .pt or .safetensors file, a directory saved by transformers or diffusers,
    MODULE:CALLABLE, or reference:penvideo20 and reference:moving-fashion.
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
@_plan_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("plan.json"), show_default=True
)
@_model_options
@_common
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
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.argument("model")
@click.option(
    "--calib", metavar="PATH", help="Only for the golden clips and the held-out test clips."
)
@_proof_options
@_model_options
@_common
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
@_common
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
@_common
def inspect(file: Path, as_json: bool, quiet: bool) -> None:
    """What FILE is (an artifact, a plan or an ONNX file): per layer, what was decided and why."""
    from vcompress.terminal import Console

    Console(as_json=as_json, quiet=quiet).inspect(file)


@cli.command()
@_common
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
@_common
def demo(target: str, output: Path, as_json: bool, quiet: bool) -> None:
    """Compress a recogniser that ships with vcompress. Needs no file and no network."""
    from vcompress import pipeline
    from vcompress.terminal import Console

    console = Console(as_json=as_json, quiet=quiet)
    source = "reference:penvideo20"
    options = pipeline.Options(target=target, calib=source, output=output, force=True)
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
        error.show()
        return error.exit_code, None
    except (click.exceptions.Abort, KeyboardInterrupt):
        return 130, "interrupted; nothing was written"
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
