"""Resident weights of a transformer in packed formats, against bfloat16.

    python -m vcompress.benchmarks.resident --output benchmarks/results/resident.json

A Wan transformer of the shape of Wan 2.1 1.3B with random weights, as it stands in memory ready to
run: bfloat16, and every linear layer packed by `vcompress.execute`. Each form has a process of its
own. `resident_bytes` counts the parameters and buffers, each storage once; `rss_bytes` is what the
process has grown by since the model was begun, as the system counts it. Layers are made, rounded
and packed one after the other, so that no form needs the memory of another; one call runs before
and after which the bytes are the same. The transformer that ships is counted beside it, with what
stays float in it. `--layers` takes fewer blocks of the same width.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vcompress
from vcompress.compress.frozen import FrozenLayer, freeze
from vcompress.compress.kernels.execute import execute, resident_bytes
from vcompress.models.empty import empty_module

WAN_1_3B: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "patch_size": (1, 2, 2), "num_attention_heads": 12,
    "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
# The shape of "reference:bouncing-garments".
SHIPPED: dict[str, Any] = {
    **WAN_1_3B, "patch_size": (4, 8, 8), "num_attention_heads": 4, "attention_head_dim": 64,
    "in_channels": 1, "out_channels": 1, "text_dim": 32, "ffn_dim": 1024, "num_layers": 8,
    "rope_max_seq_len": 32,
}  # fmt: skip
FORMS = ("bfloat16", "int8", "nvfp4")
_PLAIN = FORMS[0]
_CODES = ("weight_codes", "weight_quantized")


def filled(config: dict[str, Any], form: str) -> nn.Module:
    """The module of `config` with random weights, each linear layer in `form` at once."""
    from diffusers.utils import logging

    # It advises to keep the smallest tensors in float32.
    logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(0)
    module = empty_module(config).to(torch.bfloat16)
    for name, layer in list(module.named_modules()):
        for own, parameter in list(layer._parameters.items()):
            if parameter is not None and parameter.is_meta:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
                layer._parameters[own] = nn.Parameter(drawn.mul_(0.02), requires_grad=False)
        if form != _PLAIN and isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, freeze(layer, form, 4.0, name=name))
    return module.eval().requires_grad_(False)


def by_kind(module: nn.Module) -> dict[str, int]:
    """Bytes of codes, of their scales, and of what stays float, by what it is."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for layer in module.modules():
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is None or tensor.untyped_storage().data_ptr() in seen:
                continue
            seen.add(tensor.untyped_storage().data_ptr())
            if not isinstance(layer, FrozenLayer):
                kind = f"float: {name} of {type(layer).__name__}"
            elif name.startswith("weight"):
                kind = "codes" if name in _CODES else "scales"
            else:
                kind = f"float: {name} of quantized layers"
            counts[kind] += tensor.nbytes
    return {kind: count for kind, count in counts.most_common() if count}


def grown() -> int:
    """Bytes of this process in memory, after what is free has been given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@torch.inference_mode()
def measure(config: dict[str, Any], form: str) -> dict[str, Any]:
    """One form in this process."""
    # What imports and first calls take is no weight.
    _called(filled({**SHIPPED, "num_layers": 1}, _PLAIN), SHIPPED)
    before = grown()
    module = filled(config, form)
    if form != _PLAIN:
        execute(module)
    resident, kinds, rss = resident_bytes(module), by_kind(module), grown() - before
    is_finite = _called(module, config)
    if resident_bytes(module) != resident or not is_finite:
        message = (
            f"{form}: a call left {resident_bytes(module) - resident} bytes more, or no number"
        )
        raise SystemExit(message)
    return {
        "form": form, "resident_bytes": resident, "rss_bytes": rss,
        "rss_bytes_after_a_call": grown() - before, "kinds": kinds,
    }  # fmt: skip


def _called(module: nn.Module, config: dict[str, Any]) -> bool:
    frames, height, width = config["patch_size"]
    latents = torch.randn(1, config["in_channels"], 2 * frames, 2 * height, 2 * width)
    text = torch.randn(1, 8, config["text_dim"])
    output = module(
        hidden_states=latents.bfloat16(), timestep=torch.tensor([500]),
        encoder_hidden_states=text.bfloat16(), return_dict=False,
    )[0]  # fmt: skip
    return bool(output.isfinite().all())


def main() -> None:
    """Measure every form, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--layers", type=int, default=WAN_1_3B["num_layers"], help="blocks")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/resident.json"))
    parser.add_argument("--one", choices=("wan", "shipped"), help="in this process, as JSON")
    arguments = parser.parse_args()
    configs = {"wan": {**WAN_1_3B, "num_layers": arguments.layers}, "shipped": SHIPPED}
    if arguments.one:
        print(json.dumps(measure(configs[arguments.one], arguments.forms[0])))
        return
    results: dict[str, Any] = {
        "vcompress": vcompress.__version__, "torch": torch.__version__,
        "num_layers": arguments.layers,
    }  # fmt: skip
    for name in configs:
        lines: list[dict[str, Any]] = []
        for form in arguments.forms:
            command = [
                sys.executable, "-m", "vcompress.benchmarks.resident", "--one", name,
                "--forms", form, "--layers", str(arguments.layers),
            ]  # fmt: skip
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            line = json.loads(done.stdout)
            for key in ("resident_bytes", "rss_bytes"):
                line[f"{key}_ratio"] = (lines or [line])[0][key] / line[key]
            lines.append(line)
            print(
                f"{name} {form}: {line['resident_bytes'] / 2**20:.1f} MiB "
                f"({line['resident_bytes_ratio']:.3f}x), process {line['rss_bytes'] / 2**20:.1f} "
                f"MiB ({line['rss_bytes_ratio']:.3f}x)", flush=True,
            )  # fmt: skip
        results[name] = lines
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
