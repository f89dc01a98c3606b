"""Calibrate with NVIDIA's modelopt, compute with our numerics. The only importer of modelopt.

modelopt's calibration algorithms run on any CPU once the block formats, which it simulates on a
GPU only, are given a backend of ours (`register_quant_backend`). What comes back is plain data:
the input range of each layer and, from SmoothQuant (Xiao et al., 2022, arXiv:2211.10438) or AWQ
(Lin et al., 2023, arXiv:2306.00978), a factor for each of its input channels. The layers
themselves are frozen by `compress.frozen`, never by modelopt, since modelopt's modules do not
export with the current ONNX exporter.

modelopt's presets are not used: they switch off layers by name patterns (`*visual*`,
`*proj_out.*`) without a word. Here every quantizer is addressed by its layer's full name.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vcompress.models.video import VideoModel
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = ["ALGORITHMS", "Calibration", "calibrate"]

_NVFP4_BACKEND = "vcompress_nvfp4"
# Our name -> modelopt's algorithm. SmoothQuant is defined for INT8 inputs, AWQ for weights.
ALGORITHMS: dict[str, Any] = {
    "modelopt-max": "max",
    "smoothquant": "smoothquant",
    "awq": "awq_lite",
}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Largest absolute input by layer, after smoothing; and the smoothing, where there is one."""

    input_amax: dict[str, float]
    smoothing: dict[str, torch.Tensor]


def calibrate(
    model: VideoModel, formats: Mapping[str, str], algorithm: str,
    run_clips: Callable[[VideoModel], None],
) -> Calibration:  # fmt: skip
    """Run modelopt's `algorithm` over the clips.

    Args:
        formats: layer -> "nvfp4", "int8" or "fp8"; other layers are left out.
        algorithm: a key of `ALGORITHMS`.
        run_clips: passes all calibration clips through the model it is given.

    Raises:
        MissingCapabilityError: modelopt is not installed.
        InputError: the algorithm is unknown.
    """
    if algorithm not in ALGORITHMS:
        message = f"unknown algorithm {algorithm!r}; choose one of: max, {', '.join(ALGORITHMS)}"
        raise InputError(message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = _modelopt()
        config = {
            "quant_cfg": _quantizer_rules(formats),
            "algorithm": ALGORITHMS[algorithm],
        }
        # modelopt changes the module in place and changes its class; it gets a copy of its own.
        subject = model.copy()
        # It also reports on standard output, which belongs to our caller's result.
        with contextlib.redirect_stdout(io.StringIO()):
            quantization.quantize(subject.module, config, lambda _module: run_clips(subject))
    return _read(subject, formats)


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
    """Be modelopt's backend: quantize and dequantize `x` along its last axis with our NVFP4."""
    from vcompress.compress.numerics.nvfp4 import quantize_dequantize

    amax = getattr(quantizer, "_amax", None)
    largest = x.abs().amax() if amax is None else amax.amax()
    simulated: torch.Tensor = quantize_dequantize(x.float(), largest.float() / (6 * 448))
    return simulated.to(x.dtype)


def _quantizer_rules(formats: Mapping[str, str]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer, format_name in formats.items():
        for quantizer in ("weight_quantizer", "input_quantizer"):
            config = _quantizer_config(format_name, quantizer)
            name = f"{layer}.{quantizer}"
            rules.append({"quantizer_name": name, "cfg": config, "enable": True})
    return rules


def _quantizer_config(format_name: str, quantizer: str) -> dict[str, Any]:
    if format_name == "nvfp4":
        return {
            "num_bits": (2, 1),
            "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
            "backend": _NVFP4_BACKEND,
        }
    if format_name == "fp8":
        return {"num_bits": (4, 3), "axis": None}
    return {"num_bits": 8, "axis": 0 if quantizer == "weight_quantizer" else None}


def _read(subject: VideoModel, formats: Mapping[str, str]) -> Calibration:
    input_amax: dict[str, float] = {}
    smoothing: dict[str, torch.Tensor] = {}
    for name in formats:
        quantizer: Any = subject.layer(name).input_quantizer
        amax = getattr(quantizer, "_amax", None)
        if amax is not None:
            input_amax[name] = float(amax.float().amax())
        scale = getattr(quantizer, "_pre_quant_scale", None)
        if scale is not None:
            smoothing[name] = scale.detach().float().flatten().clone()
    return Calibration(input_amax=input_amax, smoothing=smoothing)
