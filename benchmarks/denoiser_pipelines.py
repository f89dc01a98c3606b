"""The pipelines of diffusers around the tiny denoisers of `denoiser_zoo`.

Prompts are given as embeddings, as a pipeline without a text encoder takes them. Two have a tiny
VAE, so that what comes out is a video; the others give latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks.denoiser_zoo import build

__all__ = ["PIPELINES", "STEPS", "TinyPipeline", "open_pipeline"]

STEPS = 10
_TOKENS, _WIDTH = 8, 32


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline with everything but the seed held fixed."""

    pipe: Any
    call: Mapping[str, Any]

    def __call__(self, seed: int = 0, **keywords: Any) -> torch.Tensor:
        """Frames or latents."""
        settings = {
            "num_inference_steps": STEPS, "output_type": "pt" if self.pipe.vae else "latent",
            **self.call, **keywords,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(self.pipe(generator=generator, **settings).frames)


def _prompts(*, masked: bool = False, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(2, 1, _TOKENS, _WIDTH, generator=generator)
    found: dict[str, Any] = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    if masked:
        mask = torch.ones(1, _TOKENS, dtype=torch.bool)
        found |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return found


def _wan_scheduler() -> Any:
    import diffusers

    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _wan(module: nn.Module) -> TinyPipeline:
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=_wan_scheduler(), transformer=module
    )
    return TinyPipeline(pipe, {"height": 32, "width": 32, "num_frames": 5, **_prompts()})


def _wan_of_two(module: nn.Module) -> TinyPipeline:
    import diffusers

    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=_wan_scheduler(),
        transformer=module, transformer_2=build("WanTransformer3DModel"), boundary_ratio=0.7,
    )  # fmt: skip
    return TinyPipeline(pipe, {"height": 32, "width": 32, "num_frames": 5, **_prompts()})


def _cogvideox(module: nn.Module) -> TinyPipeline:
    import diffusers

    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    ).eval()  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=module, scheduler=scheduler
    )
    return TinyPipeline(pipe, {"height": 64, "width": 64, "num_frames": 5, **_prompts()})


def _ltx(module: nn.Module) -> TinyPipeline:
    import diffusers

    pipe = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None, text_encoder=None, tokenizer=None, transformer=module,
    )  # fmt: skip
    size = {"height": 64, "width": 64, "num_frames": 9}
    return TinyPipeline(pipe, {**size, **_prompts(masked=True)})


def _hunyuan(module: nn.Module) -> TinyPipeline:
    import diffusers

    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=module, vae=None, text_encoder_2=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), tokenizer_2=None,
    )  # fmt: skip
    pooled = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2))
    return TinyPipeline(pipe, {
        "height": 32, "width": 32, "num_frames": 5, "true_cfg_scale": 2.0,
        "pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1],
        **_prompts(masked=True),
    })  # fmt: skip


def _mochi(module: nn.Module) -> TinyPipeline:
    import diffusers

    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None,
        text_encoder=None, tokenizer=None, transformer=module,
    )  # fmt: skip
    size = {"height": 32, "width": 32, "num_frames": 7}
    return TinyPipeline(pipe, {**size, **_prompts(masked=True)})


def _latte(module: nn.Module) -> TinyPipeline:
    import diffusers

    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = diffusers.LattePipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=module, scheduler=scheduler
    )
    size = {"height": 64, "width": 64, "video_length": 4, "negative_prompt": None}
    return TinyPipeline(pipe, {**size, **_prompts()})


# By name: the class of the denoiser, and the pipeline around one.
PIPELINES: Mapping[str, tuple[str, Callable[[nn.Module], TinyPipeline]]] = MappingProxyType({
    "Wan 2.1": ("WanTransformer3DModel", _wan),
    "Wan 2.2": ("WanTransformer3DModel", _wan_of_two),
    "CogVideoX": ("CogVideoXTransformer3DModel", _cogvideox),
    "LTX": ("LTXVideoTransformer3DModel", _ltx),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", _hunyuan),
    "Mochi": ("MochiTransformer3DModel", _mochi),
    "Latte": ("LatteTransformer3DModel", _latte),
})  # fmt: skip


def open_pipeline(name: str) -> TinyPipeline:
    """The pipeline `name` of `PIPELINES`, with the same random weights every time."""
    kind, make = PIPELINES[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = make(build(kind))
    made.pipe.set_progress_bar_config(disable=True)
    return made
