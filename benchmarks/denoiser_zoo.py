"""Video diffusion transformers of diffusers in tiny configurations, and calls for them.

Weights are random, so what is measured here is whether something works and computes the same, never
how good it looks.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vcompress.calib.calls import load_calls
from vcompress.compress.restore import save_module
from vcompress.export.publish import write_manifest
from vcompress.models.recording import record_calls
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, empty_plan, save_plan
from vcompress.pipeline.record import file_role
from vcompress.pipeline.run import Options
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.call import CallSpec
from vcompress.spec.dynamic_section import DynamicSection
from vcompress.spec.plan import LayerChoice

__all__ = ["CONFIGS", "arguments_of", "artifact_of", "build", "record"]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        **HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 32,
        "freq_dim": 32, "ffn_dim": 128, "rope_max_seq_len": 32,
    },
    "CogVideoXTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 32,
        "sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
        "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
    },
    "LTXVideoTransformer3DModel": {
        **HEADS, "in_channels": 16, "out_channels": 16, "cross_attention_dim": 64,
        "caption_channels": 32,
    },
    "HunyuanVideoTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 4, "num_single_layers": 2,
        "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 32, "pooled_projection_dim": 16, "rope_axes_dim": (8, 12, 12),
    },
    "MochiTransformer3DModel": {
        **HEADS, "patch_size": 2, "pooled_projection_dim": 16, "in_channels": 4,
        "text_embed_dim": 32, "time_embed_dim": 16, "max_sequence_length": 8,
    },
    "LatteTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 64,
        "attention_bias": True, "sample_size": 8, "patch_size": 2,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
        "caption_channels": 32, "video_length": 4,
    },
}  # fmt: skip


def build(name: str, num_layers: int = 2) -> nn.Module:
    """A tiny module of the class `name` with random weights, the same ones every time."""
    import diffusers

    config = {**CONFIGS[name], "num_layers": num_layers}
    if "num_single_layers" in config:
        config["num_single_layers"] = num_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: nn.Module = getattr(diffusers, name)(**config)
        for parameter in module.parameters():
            # Modulations that start at zero would hide what the blocks compute.
            if parameter.ndim < 2 or not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def arguments_of(name: str, seed: int, time: float) -> dict[str, Any]:
    """What a pipeline calls the module with; two samples of text differ in length."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, 5 + seed % 3 :] = 0
    same = {"encoder_hidden_states": noise(1, 8, 32), "timestep": torch.tensor([time])}
    if name == "WanTransformer3DModel":
        return {**same, "hidden_states": noise(1, 4, 3, 8, 8), "attention_kwargs": None}
    if name == "CogVideoXTransformer3DModel":
        angles = torch.arange(48 * 32).view(48, 32) / 99
        rotary = (angles.cos(), angles.sin())
        return {**same, "hidden_states": noise(1, 3, 4, 8, 8), "image_rotary_emb": rotary}
    if name == "LTXVideoTransformer3DModel":
        return {
            **same, "hidden_states": noise(1, 32, 16), "encoder_attention_mask": mask,
            "num_frames": 2, "height": 4, "width": 4,
            "rope_interpolation_scale": (0.32, 32, 32),
        }  # fmt: skip
    if name == "HunyuanVideoTransformer3DModel":
        return {
            **same, "hidden_states": noise(1, 4, 3, 8, 8), "encoder_attention_mask": mask,
            "pooled_projections": noise(1, 16), "guidance": torch.tensor([6000.0]),
        }  # fmt: skip
    if name == "MochiTransformer3DModel":
        return {
            **same,
            "hidden_states": noise(1, 4, 3, 8, 8),
            "encoder_attention_mask": mask.bool(),
        }
    return {**same, "hidden_states": noise(1, 4, 4, 8, 8)}


def record(name: str, module: nn.Module, path: Path) -> Path:
    """Write calls of four generations of four steps each to `path`."""
    with record_calls(module, path), torch.inference_mode():
        for generation in range(4):
            for step, time in enumerate((900.0, 700.0, 400.0, 100.0)):
                module(**arguments_of(name, 10 * generation + step, time), return_dict=False)
    return path


def artifact_of(
    model: VideoModel, calls: Path, format: str, folder: Path, cache: CacheSection | None = None,
    dynamic: DynamicSection | None = None,
) -> VideoModel:  # fmt: skip
    """Write what `compressed` reads of an artifact, every layer in `format`; the planned model."""
    folder.mkdir()
    choices = {
        name: LayerChoice(format=format, reason="", input_amax=4.0)
        if format == "keep" or facts.objection(format) is None
        else LayerChoice(format="keep", reason="")
        for name, facts in model.layers.items()
    }
    plan = empty_plan(model, load_calls(calls), Options(target="nvfp4", calib=str(calls)))
    plan = replace(plan, quantize=choices, cache=cache, dynamic_precision=dynamic)
    plan = save_plan(plan, {}, folder / "plan.json")
    planned = apply_plan(model, plan)
    save_module(planned.module, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    assert isinstance(model.inputs, CallSpec)
    keys = ("vcompress", "created", "name", "source", "inputs", "outputs", "precision", "requires")
    manifest = {
        "schema": 1, **dict.fromkeys(keys, ""), "task": "denoise", "clip": None,
        "call": model.inputs.as_dict(),
    }  # fmt: skip
    write_manifest(folder, manifest, roles={p.name: file_role(p.name) for p in folder.iterdir()})
    return planned
