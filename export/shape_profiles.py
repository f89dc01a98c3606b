"""Sizes that the dynamic inputs of an ONNX model may take in an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = ["ShapeProfile", "complete_profiles", "input_shapes", "profiles_around"]

_DEFAULT_MAX_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class ShapeProfile:
    """Smallest, typical and largest shape of a dynamic input; the typical one is tuned for."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def __post_init__(self) -> None:
        shapes = (self.minimum, self.optimum, self.maximum)
        if len({len(shape) for shape in shapes}) != 1 or not all(
            1 <= low <= typical <= high for low, typical, high in zip(*shapes, strict=True)
        ):
            message = (
                "a shape profile needs 1 <= minimum <= optimum <= maximum in every axis, got "
                f"{self.minimum}, {self.optimum}, {self.maximum}"
            )
            raise InputError(message)


def complete_profiles(
    onnx_path: Path, given: Mapping[str, ShapeProfile] | None
) -> dict[str, ShapeProfile]:
    """A profile for every dynamic input of the model, checked against its static axes."""
    inputs = input_shapes(onnx_path)
    profiles: dict[str, ShapeProfile] = {}
    for name in given or {}:
        if name not in inputs:
            message = (
                f"shape_profiles: {onnx_path.name} has no input {name!r}, it has "
                f"{', '.join(inputs)}{nearest(name, inputs)}"
            )
            raise InputError(message)
    for name, shape in inputs.items():
        if None not in shape:
            continue
        if given and name in given:
            profiles[name] = given[name]
        elif None in shape[1:]:
            message = (
                f"input {name} {_readable(shape)} is dynamic beyond its batch axis; give its "
                f"sizes as shape_profiles={{{name!r}: ShapeProfile(...)}}"
            )
            raise InputError(message)
        else:
            rest = tuple(size for size in shape[1:] if size is not None)
            profiles[name] = ShapeProfile(
                minimum=(1, *rest), optimum=(1, *rest), maximum=(_DEFAULT_MAX_BATCH, *rest)
            )
        _check_profile(name, shape, profiles[name])
    return profiles


def profiles_around(
    onnx_path: Path, typical: Mapping[str, tuple[int, ...]]
) -> dict[str, ShapeProfile]:
    """Profiles of the inputs with more free axes than the batch: up to twice the typical sizes.

    Args:
        onnx_path: the model.
        typical: shapes by input name, each also the smallest; inputs that are not free there, or
            are not in the model, are passed over.
    """
    profiles = {}
    for name, shape in input_shapes(onnx_path).items():
        if None not in shape[1:] or name not in typical:
            continue
        sizes = typical[name]
        largest = [
            size if fixed is not None else 2 * size
            for size, fixed in zip(sizes, shape, strict=True)
        ]
        if shape[0] is None:
            largest[0] = _DEFAULT_MAX_BATCH
        profiles[name] = ShapeProfile(minimum=sizes, optimum=sizes, maximum=tuple(largest))
    return profiles


def _check_profile(name: str, shape: tuple[int | None, ...], profile: ShapeProfile) -> None:
    for sizes in (profile.minimum, profile.optimum, profile.maximum):
        if len(sizes) != len(shape) or any(
            expected not in (None, size) for expected, size in zip(shape, sizes, strict=True)
        ):
            message = f"shape profile {sizes} does not fit input {name} {_readable(shape)}"
            raise InputError(message)


def _readable(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def input_shapes(onnx_path: Path) -> dict[str, tuple[int | None, ...]]:
    """Inputs of the model and their shapes, None where a size is dynamic."""
    import onnx

    if not onnx_path.is_file():
        message = f"{onnx_path} is not a file; give an ONNX model"
        raise InputError(message)
    try:
        graph = onnx.load(onnx_path, load_external_data=False).graph
    except Exception as error:
        message = f"{onnx_path} is not an ONNX model: {error}"
        raise InputError(message) from error
    weights = {initializer.name for initializer in graph.initializer}
    return {
        value.name: tuple(
            dimension.dim_value if dimension.HasField("dim_value") else None
            for dimension in value.type.tensor_type.shape.dim
        )
        for value in graph.input
        if value.name not in weights
    }
