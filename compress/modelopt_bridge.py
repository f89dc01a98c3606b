"""Calibrate with NVIDIA's modelopt, compute with our numerics. The only importer of modelopt.

modelopt's calibration algorithms run on any CPU once the block formats, which it simulates on a
GPU only, are given a backend of ours (`register_quant_backend`). What comes back is plain data:
the input range of each layer, from SmoothQuant (Xiao et al., 2022, arXiv:2211.10438) or AWQ
(Lin et al., 2023, arXiv:2306.00978) a factor for each of its input channels, from SVDQuant (Li et
al., 2024, arXiv:2411.05007) a low-rank branch as well, and from GPTQ (Frantar et al., 2022,
arXiv:2210.17323) or a search by squared error the stored weight. It comes back as it is, NaN
included: `algorithms.select.guarded` decides whether a layer uses it. The layers themselves are
frozen by `compress.frozen`, never by modelopt, since modelopt's modules do not export with the
current ONNX exporter.

modelopt's presets are not used: they switch off layers by name patterns (`*visual*`,
`*proj_out.*`) without a word. Here every quantizer is addressed by its layer's full name.

NVFP4 weights have two forms here. Where the algorithm changes the weight on its way (AWQ,
SVDQuant), block scales follow it, modelopt's `dynamic` type. Where it chooses or keeps scales (mse,
gptq) they are static; `scale_bits` is left out of that configuration and is the backend's work, as
modelopt would call a GPU kernel otherwise.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vcompress.compress.algorithms.problem import Solution
from vcompress.compress.algorithms.rounding import (
    GRIDS,
    Scales,
    pack_weight,
    round_weight,
    tensor_scale,
)
from vcompress.compress.numerics import nvfp4
from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.spec.formats import FORMATS

__all__ = ["ALGORITHMS", "RANKS", "Calibration", "calibrate"]

_NVFP4_BACKEND = "vcompress_nvfp4"
# Of the low-rank branches.
RANKS: dict[str, int] = {"svdquant": 32}
# Our name -> modelopt's algorithm. SmoothQuant is defined for INT8 inputs, AWQ for weights.
ALGORITHMS: dict[str, Any] = {
    "modelopt-max": "max",
    "modelopt-mse": "mse",
    "modelopt-gptq": {"method": "gptq"},
    "smoothquant": "smoothquant",
    "awq": "awq_lite",
    "svdquant": {"method": "svdquant", "lowrank": RANKS["svdquant"]},
}
# These choose the scales of the weight, or the weight on them.
_STORING = ("modelopt-mse", "modelopt-gptq")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What modelopt found, by the full name of the layer.

    Attributes:
        input_amax: largest absolute input after smoothing; layers that no clip reached have none.
        tensors: parts as in `compress.tensors`; a layer without any is missing.
        algorithm: a key of `ALGORITHMS`.
    """

    input_amax: dict[str, float]
    tensors: dict[str, dict[str, torch.Tensor]]
    algorithm: str

    @property
    def smoothing(self) -> dict[str, torch.Tensor]:
        """The factors `[K]` of the layers that have some."""
        return {
            name: parts["input_smoothing"]
            for name, parts in self.tensors.items()
            if "input_smoothing" in parts
        }

    def solution(self, layer: str) -> Solution:
        """What was found for one layer that the clips reached, to be judged as ours are.

        `LayerProblem.input_amax` is that of the input as it is, `Solution.input_amax` that of the
        smoothed one; `self.input_amax` is the latter.
        """
        return Solution(
            tensors=self.tensors.get(layer, {}), input_amax=self.input_amax[layer],
            note=f"modelopt {self.algorithm.removeprefix('modelopt-')}",
        )  # fmt: skip


def calibrate(
    model: VideoModel, formats: Mapping[str, str], algorithm: str,
    run_clips: Callable[[VideoModel], None],
) -> Calibration:  # fmt: skip
    """Run modelopt's `algorithm` over the clips.

    Args:
        formats: layer -> format. "nvfp4" and "fp8" are simulated as they are, all others as INT8,
            whose factors and ranges serve them too. Stored weights do not: of an algorithm that
            finds these, layers in other formats of blocks are left out.
        algorithm: a key of `ALGORITHMS`.
        run_clips: passes all calibration clips through the model it is given.

    Raises:
        MissingCapabilityError: modelopt is not installed.
        InputError: the algorithm is unknown.
    """
    if algorithm not in ALGORITHMS:
        message = f"unknown algorithm {algorithm!r}; choose one of: max, {', '.join(ALGORITHMS)}"
        raise InputError(message)
    if algorithm in _STORING:
        formats = {layer: each for layer, each in formats.items() if _can_store(each)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = _modelopt()
        if not formats:
            return Calibration(input_amax={}, tensors={}, algorithm=algorithm)
        config = {
            "quant_cfg": _quantizer_rules(model, formats, storing=algorithm in _STORING),
            "algorithm": ALGORITHMS[algorithm],
        }
        # modelopt changes the module in place and changes its class; it gets a copy of its own.
        subject = model.copy()
        # It also reports on standard output, which belongs to our caller's result, and draws bars.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            quantization.quantize(subject.module, config, lambda _module: run_clips(subject))
    with torch.no_grad():
        return _read(subject, formats, algorithm)


def _can_store(format_name: str) -> bool:
    """Whether a weight on modelopt's scales is one of the format."""
    return format_name == "nvfp4" or FORMATS[format_name].block_size <= 0


def _modelopt() -> Any:
    try:
        import modelopt.torch.quantization as quantization
        from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
            register_quant_backend,
        )
    except ImportError as error:
        message = "this algorithm needs modelopt: pip install nvidia-modelopt"
        raise MissingCapabilityError(message) from error
    register_quant_backend(_NVFP4_BACKEND, _fake_nvfp4)
    return quantization


def _fake_nvfp4(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Be modelopt's backend: quantize and dequantize `x` with our NVFP4.

    `x` is `[..., K]`, or `[number of blocks, 16]` where the scales of its blocks are static.
    """
    amax = getattr(quantizer, "_amax", None)
    static_scale = (quantizer.backend_extra_args or {}).get("tensor_scale")
    if static_scale is not None:
        assert amax is not None
        scales = _nvfp4_scales(amax, static_scale, len(x))
        return round_weight(x.float(), scales).to(x.dtype)
    largest = x.abs().amax() if amax is None else amax.amax()
    simulated: torch.Tensor = nvfp4.quantize_dequantize(x.float(), largest.float() / (6 * 448))
    return simulated.to(x.dtype)


def _nvfp4_scales(amax: torch.Tensor, static_scale: float, num_rows: int) -> Scales:
    """Scales of blocks with the largest magnitudes `amax`, in `num_rows` rows."""
    tensor = torch.tensor(static_scale)
    exact = amax.float().reshape(num_rows, -1) / nvfp4.ELEMENT_VALUES[7]
    return Scales(format="nvfp4", blocks=GRIDS["nvfp4"].allowed_scale(exact, tensor), tensor=tensor)


def _static_scale(weight: torch.Tensor) -> float:
    """The tensor scale that modelopt gives a weight."""
    scale = tensor_scale(weight.detach().float(), "nvfp4", headroom=False)
    assert scale is not None
    return float(scale)


def _quantizer_rules(
    model: VideoModel, formats: Mapping[str, str], *, storing: bool
) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer, format_name in formats.items():
        for quantizer in ("weight_quantizer", "input_quantizer"):
            config = _quantizer_config(format_name, quantizer)
            if storing and format_name == "nvfp4" and quantizer == "weight_quantizer":
                weight: Any = model.layer(layer).weight
                config["block_sizes"] = {-1: nvfp4.BLOCK_SIZE, "type": "static"}
                config["backend_extra_args"] = {"tensor_scale": _static_scale(weight)}
            name = f"{layer}.{quantizer}"
            rules.append({"quantizer_name": name, "cfg": config, "enable": True})
    return rules


def _quantizer_config(format_name: str, quantizer: str) -> dict[str, Any]:
    if format_name == "nvfp4":
        return {
            "num_bits": (2, 1),
            "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
            "backend": _NVFP4_BACKEND,
        }
    if format_name == "fp8":
        return {"num_bits": (4, 3), "axis": None}
    return {"num_bits": 8, "axis": 0 if quantizer == "weight_quantizer" else None}


def _read(subject: VideoModel, formats: Mapping[str, str], algorithm: str) -> Calibration:
    input_amax: dict[str, float] = {}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, format_name in formats.items():
        layer: Any = subject.layer(name)
        amax = getattr(layer.input_quantizer, "_amax", None)
        if amax is None:
            continue
        input_amax[name] = float(amax.float().amax())
        parts = _read_transforms(layer)
        if algorithm in _STORING:
            parts |= _read_weight(layer, format_name)
        if parts:
            tensors[name] = parts
    return Calibration(input_amax=input_amax, tensors=tensors, algorithm=algorithm)


def _read_transforms(layer: Any) -> dict[str, torch.Tensor]:
    parts: dict[str, torch.Tensor] = {}
    smoothing = getattr(layer.input_quantizer, "_pre_quant_scale", None)
    if smoothing is not None:
        parts["input_smoothing"] = smoothing.detach().float().flatten().clone()
    down = getattr(layer.weight_quantizer, "svdquant_lora_a", None)
    if down is not None:
        parts["low_rank_down"] = down.detach().float().clone()
        up = layer.weight_quantizer.svdquant_lora_b
        parts["low_rank_up"] = up.detach().float().clone()
    return parts


def _read_weight(layer: Any, format_name: str) -> dict[str, torch.Tensor]:
    """The stored weight: modelopt's weight on modelopt's scales."""
    weight = layer.weight.detach().float()
    quantizer = layer.weight_quantizer
    amax = quantizer._amax.float()
    if format_name == "nvfp4":
        static_scale = quantizer.backend_extra_args["tensor_scale"]
        scales = _nvfp4_scales(amax, static_scale, len(weight))
    else:
        grid = GRIDS[format_name]
        exact = amax.reshape(-1, 1) / grid.largest_code
        scales = Scales(format=format_name, blocks=grid.allowed_scale(exact, None))
    rows = weight.flatten(1)
    parts = dict(pack_weight(round_weight(rows, scales), scales))
    if weight.ndim > 2:
        parts["weight_quantized"] = parts["weight_quantized"].view(weight.shape)
    return parts
