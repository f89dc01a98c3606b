"""Models of every architecture that is exported, in tiny sizes with random weights.

Each comes with two inputs, and with inputs of a second shape for every group of axes that may be
free. Groups are tried from the largest to none; what a model fixes is refused with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks import denoiser_zoo
from vcompress.models.calls import Batch, Call
from vcompress.models.exportable import exportable
from vcompress.models.load import ADAPTERS
from vcompress.models.video import PrimaryOutput, primary_output

__all__ = ["MODELS", "Case"]

# Sizes by which each free axis is made larger for the second shape.
FACTORS = {"frames": 2, "height": 2, "width": 2}
GROUPS: tuple[tuple[str, ...], ...] = (("frames", "height", "width"), ("height", "width"),
                                       ("frames",), ())  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to export.

    Attributes:
        module: takes `inputs(seed)`, returns one tensor.
        inputs: a batch from a seed and factors by which axes are larger.
        axes: name of the input -> axis -> what its size is called; those that may be free.
    """

    module: nn.Module
    inputs: Callable[[int, Mapping[str, int]], Batch]
    axes: Mapping[str, Mapping[int, str]]


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _clips(shape: tuple[int, ...], axes: Mapping[int, str], seed: int,
           factors: Mapping[str, int]) -> torch.Tensor:  # fmt: skip
    """Clips `[1, *shape]`, `axes` counted with the batch."""
    sizes = [size * factors.get(axes.get(axis, ""), 1) for axis, size in enumerate(shape, start=1)]
    return _noise(seed, 1, *sizes)


def _of_clips(module: nn.Module, shape: tuple[int, ...], axes: Mapping[int, str]) -> Case:
    return Case(
        module=PrimaryOutput(module.eval().requires_grad_(False)),
        inputs=partial(_clips, shape, axes), axes={"pixel_values": axes},
    )  # fmt: skip


_T_C_H_W = {1: "frames", 3: "height", 4: "width"}
_SIZES: dict[str, Any] = {
    "image_size": 16, "num_frames": 4, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "id2label": {str(index): str(index) for index in range(5)},
}  # fmt: skip
_RECOGNISERS: dict[str, dict[str, Any]] = {
    "videomae": {"patch_size": 8, "tubelet_size": 2, "num_hidden_layers": 2},
    "vivit": {"tubelet_size": [2, 8, 8], "num_hidden_layers": 2},
    "timesformer": {"patch_size": 4, "num_hidden_layers": 2},
    "videoprism": {
        "tubelet_size": [1, 4, 4], "num_spatial_layers": 2, "num_temporal_layers": 2,
        "num_auxiliary_layers": 2,
    },
    "vjepa2": {
        "crop_size": 16, "patch_size": 4, "tubelet_size": 2, "frames_per_clip": 4,
        "num_hidden_layers": 2, "pred_hidden_size": 32, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1, "num_pooler_layers": 1, "mlp_ratio": 2,
    },
}  # fmt: skip


def _recogniser(family: str) -> Case:
    adapter = next(each for each in ADAPTERS if each.family.split("_")[0] == family)
    module = adapter.build(_SIZES | _RECOGNISERS[family])
    return _of_clips(module, (4, 3, 16, 16), _T_C_H_W)


class _Residual(nn.Module):
    """Two 3 x 3 x 3 convolutions around which the input goes, halved where `stride` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)
        self.second = nn.Conv3d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm3d(outputs), nn.BatchNorm3d(outputs)])
        self.around = nn.Conv3d(inputs, outputs, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inner)) + self.around(x))


class _R3d(nn.Module):
    """The shape of R3D: a wide first convolution, residual stages, a mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))
        self.stages = nn.Sequential(_Residual(16, 16, 1), _Residual(16, 32, 2))
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.stages(torch.relu(self.stem(x.transpose(1, 2))))
        return self.head(features.mean((2, 3, 4)))  # type: ignore[no-any-return]


def _r3d() -> Case:
    return _of_clips(_R3d(), (4, 3, 32, 32), _T_C_H_W)


class _FirstLogits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return primary_output(self.model(frames))


def _transnet_bytes(seed: int, factors: Mapping[str, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (1, 24 * factors.get("frames", 1), 27, 48, 3)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def _transnet() -> Case:
    from vcompress.benchmarks.zoo import _transnet_module

    module = _FirstLogits(_transnet_module()).eval().requires_grad_(False)
    return Case(module=module, inputs=_transnet_bytes, axes={"pixel_values": {1: "frames"}})


_LATENTS = {2: "frames", 3: "height", 4: "width"}
_DENOISER_AXES: dict[str, dict[str, dict[int, str]]] = {
    "CogVideoXTransformer3DModel": {
        "hidden_states": {1: "frames", 3: "height", 4: "width"},
        "image_rotary_emb.0": {0: "tokens"}, "image_rotary_emb.1": {0: "tokens"},
    },
    "LTXVideoTransformer3DModel": {},
}  # fmt: skip


def _denoiser_call(name: str, seed: int, factors: Mapping[str, int]) -> Call:
    given = denoiser_zoo.arguments_of(name, seed, 700.0 - 100 * seed)
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    rotary = given.get("image_rotary_emb", ())
    shared = {f"image_rotary_emb.{place}": each for place, each in enumerate(rotary)}
    axes = _DENOISER_AXES.get(name, {"hidden_states": _LATENTS}).get("hidden_states", {})
    repeats = [factors.get(axes.get(axis, ""), 1) for axis in range(tensors["hidden_states"].ndim)]
    tensors["hidden_states"] = tensors["hidden_states"].repeat(repeats)
    tokens = 1
    for factor in factors.values():
        tokens *= factor
    shared = {key: each.repeat(tokens, 1) for key, each in shared.items()}
    rest = {
        key: value for key, value in given.items()
        if key not in tensors and key != "image_rotary_emb"
    }  # fmt: skip
    ordered = {"hidden_states": tensors.pop("hidden_states"), **tensors}
    return Call(tensors=ordered, shared=shared, constants={**rest, "return_dict": False})


def _denoiser(name: str) -> Case:
    inputs = partial(_denoiser_call, name)
    return Case(
        module=PrimaryOutput(exportable(denoiser_zoo.build(name)), inputs(0, {})), inputs=inputs,
        axes=_DENOISER_AXES.get(name, {"hidden_states": _LATENTS}),
    )  # fmt: skip


class _Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        frames: torch.Tensor = self.autoencoder.decode(latents, return_dict=False)[0]
        return frames


_AUTOENCODERS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1,
        "temperal_downsample": [True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8), "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2, "latent_channels": 4,
        "layers_per_block": 1, "norm_num_groups": 2, "temporal_compression_ratio": 2,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8, 8), "layers_per_block": (1, 1),
        "decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, False), "decoder_spatio_temporal_scaling": (True, False),
        "decoder_inject_noise": (False, False, False), "upsample_residual": (False, False),
        "upsample_factor": (1, 1), "patch_size": 2, "patch_size_t": 1,
        "down_block_types": ("LTXVideoDownBlock3D",) * 2,
    },
}  # fmt: skip


def _autoencoder(name: str) -> Case:
    import diffusers

    config = _AUTOENCODERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _Decoder(getattr(diffusers, name)(**config))
    channels = 8 if name == "AutoencoderKLLTXVideo" else 4
    return _of_clips(module, (channels, 3, 8, 8), _LATENTS)


MODELS: Mapping[str, Callable[[], Case]] = {
    **{family: partial(_recogniser, family) for family in _RECOGNISERS},
    "r3d": _r3d,
    "transnetv2": _transnet,
    **{name: partial(_denoiser, name) for name in denoiser_zoo.CONFIGS},
    **{name: partial(_autoencoder, name) for name in _AUTOENCODERS},
}
