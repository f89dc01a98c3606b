"""What the kernels are worth on a GPU: parity, products, whole models, memory.

    python -m vcompress.benchmarks.gpu.suite --sections parity,gemm --output results.json
    python -m vcompress.benchmarks.gpu.suite --device cpu --tiny      # does it run at all

Weights are random: nothing here tells quality. A peer that is not installed is named as absent.
Each section stays within eight minutes on an H200: `model` takes one shape a call, by its name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks.gpu.shapes import SHAPES, Shape, Transformer, tiny
from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels.execute import execute, resident_bytes
from vcompress.compress.kernels.linear import FOUR_BIT_INPUTS, ExecutableLinear
from vcompress.compress.kernels.operators import block_rounded
from vcompress.compress.numerics import mxfp8, nvfp4
from vcompress.pipeline.device_timing import graphed, time_in_turn

# NVIDIA H200 SXM data sheet: dense operations a second, and bytes a second of the memory.
RATES = {"bfloat16": 989e12, "fp8": 1979e12, "int8": 1979e12}
BANDWIDTH = 4.8e12
FORMATS = ("int8", "int8_token", "fp8", "fp8_channel", "nvfp4", "mxfp4", "mxfp8", "int4_g128")
AMAX = 6.0
# Of the steps of a sampler; what the trained transformer bears is measured elsewhere.
HIT_RATE = 0.5


def parity(device: torch.device, small: bool) -> dict[str, Any]:
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
    if device.type != "cuda" or importlib.util.find_spec("modelopt") is None:
        return {**result, "modelopt": "absent, or no GPU for its kernel"}
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel_hopper import fp4_fake_quant_block

    peer = fp4_fake_quant_block(on, on.abs().amax()).float().cpu()
    result["modelopt nvfp4"] = _difference(peer, expected["nvfp4"])
    return result


def _difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    # Scales are multiplied in another order, which moves the last bit.
    other = ~torch.isclose(found, expected, rtol=1e-6, atol=0)
    return {
        "values": found.numel(), "values_that_differ": int(other.sum()),
        "largest_difference": float((found - expected).abs().max()),
    }  # fmt: skip


def gemm(device: torch.device, small: bool) -> dict[str, Any]:
    """Linear layers of the shapes in every format against bfloat16 and the limits of the device."""
    rows = []
    for shape in (tiny(each) if small else each for each in SHAPES.values()):
        m = shape.batch * shape.tokens
        for k, n in ((shape.width, shape.width), (shape.width, shape.hidden),
                     (shape.hidden, shape.width)):  # fmt: skip
            rows.append({"model": shape.name, "m": m, "k": k, "n": n, **_products(m, k, n, device)})
    return {"rows": rows, "rates": RATES, "bandwidth": BANDWIDTH}


def _products(m: int, k: int, n: int, device: torch.device) -> dict[str, Any]:
    dtype = torch.bfloat16
    layer = nn.Linear(k, n)
    x = torch.randn(m, k, device=device, dtype=dtype)
    forms: dict[str, nn.Module] = {"bfloat16": _like(layer, device, dtype)}
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
    kept = times["bfloat16"][0]
    formats = {}
    for name, form in forms.items():
        seconds, spread = times[name]
        inputs = form.inputs if isinstance(form, ExecutableLinear) else "float"
        limit = max(
            2 * m * k * n / RATES.get(inputs, RATES["bfloat16"]),
            (resident_bytes(form) + 2 * m * (k + n)) / BANDWIDTH,
        )
        formats[name] = {
            "seconds": seconds, "spread": spread, "speedup": kept / seconds,
            "share_of_limit": limit / seconds,
            "kernel": form.kernel if isinstance(form, ExecutableLinear) else "torch",
        }  # fmt: skip
    return {"formats": formats}


def _like(layer: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features, device=device, dtype=dtype)
    other.load_state_dict(layer.state_dict())
    return other.requires_grad_(False)


def _call(form: nn.Module, *inputs: torch.Tensor) -> Callable[[], object]:
    return lambda: form(*inputs)


def model(shape: Shape, device: torch.device, small: bool) -> dict[str, Any]:
    """One model end to end: as it is, compiled, with torchao, and ours; memory at its peak."""
    results: dict[str, Any] = {}
    ways = ["bfloat16", "bfloat16 compiled", "torchao fp8 compiled",
            *(f"{name} compiled" for name in ("fp8_channel", "int8_token", "nvfp4"))]  # fmt: skip
    for way in ways:
        torch.manual_seed(0)
        module = Transformer(shape).to(device, torch.bfloat16).eval().requires_grad_(False)
        inputs = module.example(device, torch.bfloat16)
        name = way.removesuffix(" compiled")
        if name == "torchao fp8":
            if importlib.util.find_spec("torchao") is None:
                results[way] = "absent: torchao"
                continue
            _torchao(module)
        elif name != "bfloat16":
            _swap(module, name)
        # A compiler for C++ is no part of a CPU's dry run.
        run: Any = torch.compile(module) if way != name and not small else module
        results[way] = _timed(run, module, inputs, shape, device)
    return results


def _swap(module: nn.Module, format_name: str) -> None:
    for parent in list(module.modules()):
        for child, each in list(parent.named_children()):
            if isinstance(each, nn.Linear):
                setattr(parent, child, freeze(each, format_name, AMAX))
    execute(module)


def _torchao(module: nn.Module) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    quantize_(module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _timed(
    run: Any, module: nn.Module, inputs: tuple[torch.Tensor, ...], shape: Shape,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = time_in_turn(
        {
            "call": lambda: run(*inputs),
            **({"steps": lambda: _steps(run, inputs, shape.steps, 0.0),
                "steps with cache": lambda: _steps(run, inputs, shape.steps, HIT_RATE)}
               if shape.steps > 1 else {}),
        },
        device, rounds=2 if device.type == "cpu" else 3,
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "seconds": {
            name: {"least": low, "spread": spread} for name, (low, spread) in times.items()
        },
        "resident_weight_bytes": resident_bytes(module), "peak_bytes": peak,
    }  # fmt: skip


def _steps(run: Any, inputs: tuple[torch.Tensor, ...], steps: int, hit_rate: float) -> torch.Tensor:
    """A sampler's loop in which a fixed share of the steps adds what the last full one added."""
    x, residual, owed = inputs[0], None, 0.0
    for _ in range(steps):
        owed += hit_rate
        if residual is not None and owed >= 1:
            owed -= 1
            x = x + 0.01 * residual
        else:
            residual = run(x, *inputs[1:]) - x
            x = x + 0.01 * residual
    return x


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the sections that are asked for and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ("parity", "gemm", *SHAPES)
    parser.add_argument("--sections", default=",".join(known))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    wanted = chosen.sections.split(",")
    if unknown := sorted({*wanted} - {*known}):
        parser.error(f"no section {', '.join(unknown)}; choose of {', '.join(known)}")
    device = torch.device(chosen.device)
    results: dict[str, Any] = {"command": sys.argv if arguments is None else arguments,
                               "machine": _machine(device), "sections": {}}  # fmt: skip
    with torch.inference_mode():
        for name in wanted:
            start = time.monotonic()
            if name in SHAPES:
                shape = tiny(SHAPES[name]) if chosen.tiny else SHAPES[name]
                found = model(shape, device, chosen.tiny)
            else:
                found = {"parity": parity, "gemm": gemm}[name](device, chosen.tiny)
            results["sections"][name] = {"wall_seconds": time.monotonic() - start, **found}
            if chosen.output is not None:
                # After each section: a later one may not end.
                chosen.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return results


def _machine(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": "cpu" if gpu is None else gpu.name, "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "memory_bytes": None if gpu is None else gpu.total_memory,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
