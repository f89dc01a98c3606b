"""Kernels one by one: do they round as the numerics say, and what is a product worth."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks.gpu.subjects import Subject
from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels.execute import resident_bytes
from vcompress.compress.kernels.linear import FOUR_BIT_INPUTS, ExecutableLinear
from vcompress.compress.kernels.operators import block_rounded
from vcompress.compress.numerics import mxfp8, nvfp4
from vcompress.pipeline.device_timing import graphed, time_in_turn

__all__ = ["AMAX", "measure_parity", "measure_products"]

# NVIDIA H200 SXM data sheet: dense operations a second, and bytes a second of the memory.
RATES = {"bfloat16": 989e12, "fp8": 1979e12, "int8": 1979e12}
BANDWIDTH = 4.8e12
FORMATS = ("int8", "int8_token", "fp8", "fp8_channel", "nvfp4", "mxfp4", "mxfp8", "int4_g128")
# Of the inputs; random ones, so that any number will do.
AMAX = 6.0


def measure_parity(device: torch.device, *, small: bool) -> dict[str, Any]:
    """The rounding kernels against `compress.numerics`, and modelopt's against them."""
    sizes = (64, 256) if small else (4096, 4096)
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0)) * 3
    scale = nvfp4.input_scale(float(x.abs().amax()))
    expected = {
        "nvfp4": nvfp4.quantize_dequantize(x, scale), "mxfp8": mxfp8.quantize_dequantize(x),
    }  # fmt: skip
    on, there = x.to(device), scale.to(device)
    found = {
        "nvfp4": block_rounded(on, there, "nvfp4").float() * there,
        "mxfp8": block_rounded(on, None, "mxfp8").float(),
    }
    result: dict[str, Any] = {
        name: _difference(found[name].cpu(), expected[name]) for name in expected
    }
    for name in expected:
        result[f"modelopt {name}"] = _against_modelopt(name, on, expected[name])
    return result


def _against_modelopt(name: str, x: torch.Tensor, expected: torch.Tensor) -> dict[str, Any] | str:
    if x.device.type != "cuda":
        return "no GPU for its kernel"
    if importlib.util.find_spec("modelopt") is None:
        return "absent: modelopt"
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    preset = mtq.NVFP4_DEFAULT_CFG if name == "nvfp4" else mtq.MXFP8_DEFAULT_CFG
    (settings,) = (
        rule["cfg"]
        for rule in preset["quant_cfg"]
        if rule["quantizer_name"] == "*input_quantizer" and "cfg" in rule
    )
    try:
        quantizer = TensorQuantizer(QuantizerAttributeConfig(**settings)).to(x.device)
        quantizer.amax = x.abs().amax()
        return _difference(quantizer(x).float().cpu(), expected)
    # Its kernels are built on first use, which fails in many ways; the rest is to be measured.
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:300]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    # Scales are multiplied in another order, which moves the last bit.
    other = ~torch.isclose(found, expected, rtol=1e-6, atol=0)
    return {
        "values": found.numel(), "values_that_differ": int(other.sum()),
        "largest_difference": float((found - expected).abs().max()),
    }  # fmt: skip


def measure_products(subjects: Sequence[Subject], device: torch.device) -> dict[str, Any]:
    """Linear layers in every format against bfloat16 and the limits of the device.

    `linear_part` is what all linear layers of a model that see all its tokens take together.
    """
    rows, parts = [], {}
    for subject in subjects:
        m, seconds = subject.batch * subject.tokens, dict[str, float]()
        for (k, n), count in subject.linears.items():
            formats = _formats(m, k, n, device)
            rows.append({"model": subject.name, "m": m, "k": k, "n": n, "formats": formats})
            for name, found in formats.items():
                seconds[name] = seconds.get(name, 0) + subject.depth * count * found["seconds"]
        parts[subject.name] = {
            name: {"seconds": each, "speedup": seconds["bfloat16"] / each}
            for name, each in seconds.items()
        }  # fmt: skip
    return {"rows": rows, "linear_part": parts, "rates": RATES, "bandwidth": BANDWIDTH}


def _formats(m: int, k: int, n: int, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16
    layer = nn.Linear(k, n)
    x = torch.randn(m, k, device=device, dtype=dtype)
    kept = copy.deepcopy(layer).to(device, dtype).requires_grad_(False)
    forms: dict[str, nn.Module] = {"bfloat16": kept}
    for name in FORMATS:
        if k % 128 and name == "int4_g128":
            continue
        frozen = freeze(layer, name, AMAX)
        assert isinstance(frozen, FrozenLinear)
        for inputs in FOUR_BIT_INPUTS if name == "nvfp4" else FOUR_BIT_INPUTS[:1]:
            made = ExecutableLinear(frozen, inputs).to(device)
            forms[name if inputs == "plan" else f"{name} with {inputs} inputs"] = made
    times = time_in_turn(
        {name: graphed(_call(form, x), device) for name, form in forms.items()}, device,
        rounds=2 if device.type == "cpu" else 20,
    )  # fmt: skip
    found = {}
    for name, form in forms.items():
        seconds, spread = times[name]
        inputs = form.inputs if isinstance(form, ExecutableLinear) else "float"
        limit = max(
            2 * m * k * n / RATES.get(inputs, RATES["bfloat16"]),
            (resident_bytes(form) + 2 * m * (k + n)) / BANDWIDTH,
        )
        found[name] = {
            "seconds": seconds, "spread": spread, "speedup": times["bfloat16"][0] / seconds,
            "share_of_limit": limit / seconds,
            "kernel": form.kernel if isinstance(form, ExecutableLinear) else "torch",
        }  # fmt: skip
    return found


def _call(form: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: form(x)
