"""Whether Triton runs the kernels of a device, and the types that its kernels multiply.

What: on a GPU Triton compiles; with `TRITON_INTERPRET=1`, set before Triton is imported, its
interpreter runs the same kernels on tensors of a CPU. Without either, `operators` has torch compute
the same integers and floats.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from vcompress.spec.errors import MissingCapabilityError

__all__ = ["interpreted", "needs_triton", "runs_triton"]


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through the Triton kernels.

    Raises:
        MissingCapabilityError: a GPU without the package triton.
    """
    if device.type == "cuda":
        needs_triton()
        return True
    return interpreted() and _installed()


def needs_triton() -> None:
    """Raise `MissingCapabilityError` unless the package triton is installed."""
    if not _installed():
        message = (
            "the kernels for GPUs need the package triton, which is not installed; "
            "pip install 'vcompress-ai[kernels]'"
        )
        raise MissingCapabilityError(message)
