"""The flags that several commands share, in the groups in which they come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vcompress.spec.defaults import MAX_LAYER_ERROR, NUM_CLIPS, NUM_TEST_CLIPS
from vcompress.spec.target import TARGETS

__all__ = ["common", "model_options", "plan_options", "proof_options"]

_F = TypeVar("_F", bound=Callable[..., Any])


class _Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """`value` as a tuple."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.5,0.5", param, ctx)


NUMBERS = _Numbers()


def _with_options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """One decorator out of several, which `--help` lists in this order."""

    def decorate(function: _F) -> _F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


common = _with_options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on standard error."),
)

model_options = _with_options(
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
        "--mean", type=NUMBERS, help="Normalisation, one value or one a channel: 0.485,0.456,0.406."
    ),
    click.option("--std", type=NUMBERS, help="The same for the divisor: 0.229,0.224,0.225."),
    click.option(
        "--task",
        type=click.Choice(["classify", "embed", "restore", "generic"]),
        help="What the output means, where the model does not say.",
    ),
)

plan_options = _with_options(
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

proof_options = _with_options(
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
