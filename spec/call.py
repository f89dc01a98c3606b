"""The inputs of a model that takes several named tensors: a denoiser's latents, time and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import check_keys

__all__ = ["CallSpec", "TensorSpec"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named tensor.

    Attributes:
        name: of the argument; `image_rotary_emb.0` is the first of a tuple.
        shape: without the batch axis; the whole shape of a shared tensor.
        dtype: in the words of torch, such as `float32`.
        shared: has no batch axis and is the same in every call.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class CallSpec:
    """What every call of a model has in common.

    Attributes:
        tensors: in the order of the call; the first has a batch axis.
        constants: arguments that are no tensors, by name; exported graphs have them built in.
    """

    tensors: tuple[TensorSpec, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors or self.tensors[0].shared:
            message = "a call needs at least one tensor with a batch axis, and that one first"
            raise InputError(message)

    def __str__(self) -> str:
        """One line: every tensor with its shape, then the constants."""
        tensors = [
            f"{one.name} {[*(() if one.shared else ('B',)), *one.shape]}".replace("'", "")
            for one in self.tensors
        ]
        return ", ".join([*tensors, *(f"{key}={value}" for key, value in self.constants.items())])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {
            "tensors": [
                {
                    "name": one.name, "shape": list(one.shape), "dtype": one.dtype,
                    "shared": one.shared,
                }
                for one in self.tensors
            ],
            "constants": dict(self.constants),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> CallSpec:
        """The inverse of `as_dict`; everything that is wrong is an `InputError`."""
        check_keys(data, required=("tensors", "constants"), where="call")
        keys = ("name", "shape", "dtype", "shared")
        for one in data["tensors"]:
            check_keys(one, required=keys, where="call.tensors")
        return cls(
            tensors=tuple(
                TensorSpec(
                    name=str(one["name"]), shape=tuple(int(size) for size in one["shape"]),
                    dtype=str(one["dtype"]), shared=bool(one["shared"]),
                )
                for one in data["tensors"]
            ),
            constants=dict(data["constants"]),
        )  # fmt: skip
