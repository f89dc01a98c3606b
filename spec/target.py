"""Deployment targets: what `--target` means."""

from __future__ import annotations

from dataclasses import dataclass

from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a deployment accepts.

    Attributes:
        name: the word after `--target`.
        formats: in order of preference; the first is taken wherever a layer can bear it, the last
            (`keep`) is the fallback.
        engine_sm: compute capabilities for which a TensorRT-RTX engine is built.
        hardware: for whom this target is, in one line.
        searches: the formats of all layers are searched together under a budget; their order does
            not matter then.
        attention: formats for the products of attention; see `spec.attention_section`.
        attention_by_name: those that "auto" does not take, since they save least.
    """

    name: str
    formats: tuple[str, ...]
    engine_sm: tuple[str, ...]
    hardware: str
    searches: bool = False
    attention: tuple[str, ...] = ()
    attention_by_name: tuple[str, ...] = ()


_EIGHT_BITS = ("fp8", "int8", "int8_fp8")

TARGETS: dict[str, Target] = {
    "nvfp4": Target(
        name="nvfp4", formats=("nvfp4", "int8", FLOAT), engine_sm=("120",),
        hardware="NVIDIA Blackwell: the only GPUs with FP4 tensor cores", attention=_EIGHT_BITS,
    ),
    "fp8": Target(
        name="fp8", formats=("fp8", FLOAT), engine_sm=("120",),
        hardware="NVIDIA Ada, Hopper and Blackwell", attention=_EIGHT_BITS,
    ),
    "int8": Target(
        name="int8", formats=("int8", FLOAT), engine_sm=("120",),
        hardware="every NVIDIA GPU since Turing, and CPUs", attention=("int8",),
        attention_by_name=("int8_keep",),
    ),
    "int8_token": Target(
        name="int8_token", formats=("int8_token", FLOAT), engine_sm=("120",),
        hardware="CPUs with OpenVINO: a scale for every token, more exact than INT8; no ranges",
    ),
    "int4": Target(
        name="int4", formats=("int4_g128", "int4_g64", "int4_g32", FLOAT), engine_sm=("120",),
        hardware="NVIDIA GPUs where reading weights is what takes the time; inputs stay float",
    ),
    "mxfp8": Target(
        name="mxfp8", formats=("mxfp8", FLOAT), engine_sm=("120",),
        hardware="NVIDIA Blackwell: no calibrated ranges, all scales are dynamic",
        attention=_EIGHT_BITS,
    ),
    "mixed": Target(
        name="mixed", formats=("nvfp4", "mxfp8", "fp8", "int8", FLOAT), engine_sm=("120",),
        hardware="NVIDIA Blackwell: each layer gets what pays for it", searches=True,
        attention=_EIGHT_BITS,
    ),
}  # fmt: skip


def find_target(name: str) -> Target:
    """The target called `name`; an `InputError` lists the known ones otherwise."""
    if name not in TARGETS:
        message = f"unknown target {name!r}; choose one of: {', '.join(TARGETS)}"
        raise InputError(message)
    return TARGETS[name]
