"""The golden inputs of an artifact, as what a graph is run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch

from vcompress.export.manifest import GOLDEN_INPUTS
from vcompress.models.calls import Batch, Call
from vcompress.spec.artifact import Artifact
from vcompress.spec.call import CallSpec

__all__ = ["golden_inputs"]

Array = npt.NDArray[Any]


def golden_inputs(artifact: Artifact, golden: Mapping[str, Array]) -> Batch | Array:
    """The clips in the file of golden inputs, or the call."""
    if artifact.manifest.get("call") is None:
        return golden[GOLDEN_INPUTS]
    spec = CallSpec.from_dict(artifact.manifest["call"])

    def read(shared: bool) -> dict[str, torch.Tensor]:
        return {
            one.name: torch.from_numpy(golden[f"{GOLDEN_INPUTS}.{one.name}"])
            for one in spec.tensors
            if one.shared is shared
        }

    return Call(tensors=read(shared=False), shared=read(shared=True), constants=spec.constants)
