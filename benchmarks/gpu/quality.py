"""What the settings of the speed runs do to a trained model: the video transformer that ships.

Clips of prompts that nothing was chosen by, against those of the model in float32 from the same
noise.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from vcompress.benchmarks.gpu.subjects import to_bfloat16
from vcompress.benchmarks.gpu.whole import cache_section, freeze_blocks
from vcompress.compress.cache import apply_cache
from vcompress.compress.kernels.execute import execute, resident_bytes

__all__ = ["measure_quality"]

SEED = 90_000
# (format of the linear layers, whether steps are reused)
WAYS = (
    ("bfloat16", False), ("fp8_channel", False), ("int8_token", False), ("nvfp4", False),
    ("bfloat16", True), ("fp8_channel", True), ("nvfp4", True),
)  # fmt: skip


def measure_quality(device: torch.device, *, small: bool) -> dict[str, Any]:
    """PSNR and SSIM against float32 and seconds a generation, way by way."""
    try:
        from vcompress.models.reference.diffusion_sampler import generate, reference_pipeline
        from vcompress.models.reference.judge_diffusion import held_out_prompts
        from vcompress.validate.frames import psnr_db, ssim
    except ImportError as error:
        return {"absent": error.name}
    prompts, steps = held_out_prompts(1 if small else 8), 10 if small else 50
    pipe = reference_pipeline("bouncing-garments").to(device)

    def run() -> tuple[Any, float]:
        start = time.perf_counter()
        clips = generate(pipe, prompts, seed=SEED, num_steps=steps)
        return clips, time.perf_counter() - start

    ranges = _observe(pipe.transformer, run)
    expected, seconds = run()
    expected = expected[..., None] / 255
    results: dict[str, Any] = {"float32": {"seconds": seconds}}
    for name, is_cached in WAYS[-2:] if small else WAYS:
        transformer = reference_pipeline("bouncing-garments").transformer.to(device)
        to_bfloat16(transformer)
        if name != "bfloat16":
            freeze_blocks(transformer, name, ranges.__getitem__)
            execute(transformer)
        pipe.transformer = transformer
        cached = (
            apply_cache(transformer, cache_section(steps), scheduler=pipe.scheduler)
            if is_cached
            else None
        )
        run()  # kernels are compiled
        clips, seconds = run()
        each = [
            (psnr_db(theirs, ours), ssim(theirs, ours))
            for ours, theirs in zip(clips[..., None] / 255, expected, strict=True)
        ]
        results[f"{name} + cache" if is_cached else name] = {
            "psnr_db": float(np.mean([one for one, _ in each])),
            "psnr_db_least": float(min(one for one, _ in each)),
            "ssim": float(np.mean([one for _, one in each])), "seconds": seconds,
            "resident_weight_bytes": resident_bytes(transformer),
            "skip_rate": cached.report().skip_rate if cached is not None else 0.0,
        }  # fmt: skip
        if cached is not None:
            cached.remove()
    return {"clips": len(prompts), "steps": steps, "ways": results}


def _observe(module: nn.Module, run: Any) -> dict[str, float]:
    """The largest magnitude that enters each linear layer in a generation."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            now = inputs[0].abs().amax()
            found[name] = torch.maximum(found[name], now) if name in found else now

        return seen

    handles = [
        each.register_forward_pre_hook(watch(name))
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return {name: float(each) for name, each in found.items()}
