"""The flags that several commands share, in the groups in which they come."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vcompress.spec.defaults import ALGORITHM, ATTENTION, MAX_LAYER_ERROR, NUM_CLIPS, NUM_TEST_CLIPS
from vcompress.spec.files import check_clips, check_model
from vcompress.spec.target import TARGETS

if TYPE_CHECKING:
    from vcompress.models.load import LoadOptions

__all__ = [
    "bar_options", "check_sources", "common", "load_options", "model_options", "plan_options",
    "proof_options", "speed_option",
]  # fmt: skip

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


class _Words(click.ParamType[tuple[str, ...]]):
    """Words separated by commas."""

    name = "words"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """`value` as a tuple."""
        return tuple(dict.fromkeys(part.strip() for part in str(value).split(",") if part.strip()))


class _Size(click.ParamType[int]):
    """Bytes, with or without a unit."""

    name = "size"
    _UNITS = MappingProxyType({
        "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20,
        "GIB": 2**30,
    })  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`value` in bytes."""
        found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        unit = self._UNITS.get(found.group(2).upper()) if found else None
        if found is None or unit is None:
            self.fail(f"{value!r} is not a size such as 12MB, 12MiB or 12000000", param, ctx)
        return int(float(found.group(1)) * unit)


class _Tokens(click.ParamType[float | str]):
    """A number, or a word."""

    name = "tokens"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """`value` as a number if it is one."""
        try:
            return float(value)
        except ValueError:
            return str(value)


NUMBERS = _Numbers()
WORDS = _Words()
TOKENS = _Tokens()
SIZE = _Size()


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
        help="Input of a model that no adapter knows, or sizes that a graph leaves open, e.g. "
        "NCTHW:float32:1x3x16x112x112.",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Open whole pickled modules, and .pt2 files. Runs code from the file.",
    ),
    click.option("--clip-stride", type=click.IntRange(1), help="Take every n-th frame of a video."),
    click.option("--fps", type=float, help="Resample videos to this frame rate first."),
    click.option(
        "--mean", type=NUMBERS, help="Normalisation, one value or one a channel: 0.485,0.456,0.406."
    ),
    click.option("--std", type=NUMBERS, help="The same for the divisor: 0.229,0.224,0.225."),
    click.option(
        "--task",
        type=click.Choice(["classify", "embed", "detect", "restore", "generic"]),
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
        help="Clips to calibrate on: a folder of videos, an .npz or a .pt file; for a denoiser, "
        "recorded calls.",
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
        type=TOKENS,
        metavar="RATIO|auto|PLAN",
        help="Reduce tokens: to a mean share such as 0.7; by a searched schedule that holds half "
        "of --max-drop (auto); or as a plan of vcompress tokens says.",
    ),
    click.option(
        "--algorithm",
        default=ALGORITHM,
        show_default=True,
        help="How layers of few bits are calibrated: auto (layer by layer the best of a few), max, "
        "gptq, hadamard, svdquant, awq, ...; an unknown name lists all.",
    ),
    click.option(
        "--attention",
        default=ATTENTION,
        show_default=True,
        metavar="keep|auto|int8|fp8|int8_fp8|int8_keep",
        help="Format of the products of attention (QK, PV); auto takes the one with the "
        "smallest error. An attention that it hurts more than --max-layer-error is kept.",
    ),
    click.option(
        "--budget-bits",
        type=float,
        metavar="BITS",
        help="For --target mixed: effective bits a weight, scales counted.",
    ),
    click.option(
        "--max-size",
        type=SIZE,
        metavar="SIZE",
        help="For --target mixed: all weights in at most so much, e.g. 12MB or 12MiB.",
    ),
    click.option(
        "--max-latency",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="For --target mixed: time, as a share of that of MODEL in float. Formats that do not "
        "run here are out, unless a table says what they take.",
    ),
    click.option(
        "--latency-table",
        metavar="PATH|roofline",
        help="With --max-latency: times of another machine, made there with vcompress latency, or "
        "an estimate for an NVIDIA RTX 5090. Default: measured here in ONNX Runtime.",
    ),
    click.option(
        "--cache",
        metavar="PLAN|auto",
        help="For a denoiser: what is used again from step to step. A plan of vcompress cache, or "
        "a search in its pipeline with the quantized layers; needs --min-psnr.",
    ),
    click.option(
        "--dynamic-precision",
        is_flag=True,
        help="For a denoiser with NVFP4 layers: decide block by block and step by step which "
        "inputs have four bits and which eight; needs --min-psnr.",
    ),
    click.option(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="Of --cache auto and --dynamic-precision: PSNR of generated clips.",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Of the same two: one a line, or a .pt file with prompt_embeds.",
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

bar_options = _with_options(
    click.option(
        "--max-drop",
        type=click.FloatRange(0),
        metavar="POINTS",
        help="The bar of searches and of the proof, which exits with 3 if top-1 drops more. "
        "Default: 1.0 if the clips have labels.",
    ),
    click.option(
        "--min-sqnr",
        type=float,
        metavar="DB",
        help="The same for the SQNR of the outputs, at least.",
    ),
)

speed_option = click.option(
    "--min-speedup",
    type=click.FloatRange(0, min_open=True),
    metavar="TIMES",
    help="The bar for the speed, e.g. 1.5: exits with 3 unless the artifact is so many times as "
    "fast as the baseline on a core of this machine. Takes a minute.",
)

proof_options = _with_options(
    click.option(
        "--data",
        metavar="PATH",
        help="Test clips, in folders by class. Default: a held-out part of --calib.",
    ),
    click.option(
        "--num-test-clips",
        type=click.IntRange(1),
        help="Test clips, at most. Default: a quarter of the clips that are drawn from --calib, or "
        f"{NUM_TEST_CLIPS} of --data.",
    ),
    bar_options,
    speed_option,
    click.option(
        "--dynamic",
        type=WORDS,
        default="",
        metavar="AXES",
        help="Axes of a clip to leave free in the graphs, of frames, height and width: "
        "--dynamic height,width. The batch is free where the model allows it.",
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


def check_sources(model: str, values: Mapping[str, Any]) -> None:
    """Raise `InputError` for a path with nothing at it, before anything heavy is imported."""
    check_model(model)
    for name in ("calib", "data"):
        check_clips(values.get(name))


def load_options(values: dict[str, Any]) -> LoadOptions:
    """Take what is about loading a model out of `values`."""
    from vcompress.models.load import LoadOptions

    names = ("arch", "input_spec", "trust_pickle", "clip_stride", "fps", "mean", "std", "task")
    return LoadOptions(**{name: values.pop(name) for name in names})
