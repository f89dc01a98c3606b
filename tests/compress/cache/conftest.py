"""Pipelines of diffusers around tiny denoisers with random weights, and a denoiser by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

TEXT = 5
STEPS = 8


class Pipe:
    """A real pipeline with everything but the seed held fixed."""

    def __init__(self, pipe: Any, **keywords: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.keywords = pipe, keywords

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    def __call__(self, seed: int = 0, **keywords: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": STEPS, **self.keywords, **keywords}
        return self.pipe(generator=generator, output_type="latent", **settings).frames


def _texts(width: int, **keywords: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(2, 1, TEXT, width, generator=generator)
    return {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], **keywords}


def _masked(width: int) -> dict[str, Any]:
    ones = torch.ones(1, TEXT, dtype=torch.bool)
    masks = {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return _texts(width, **masks)


def _wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan() -> Pipe:
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=_wan_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return Pipe(pipe, height=32, width=32, num_frames=5, **_texts(16))


def wan_of_two() -> Pipe:
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=_wan_transformer(),
        transformer_2=_wan_transformer(), boundary_ratio=0.6,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    return Pipe(pipe, height=32, width=32, num_frames=5, **_texts(16))


def cogvideox() -> Pipe:
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=4, sample_height=4,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=module.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )  # fmt: skip
    return Pipe(pipe, height=32, width=32, num_frames=5, **_texts(16))


def ltx() -> Pipe:
    module = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=module.eval()
    )
    return Pipe(pipe, height=64, width=64, num_frames=9, **_masked(16))


def hunyuan() -> Pipe:
    module = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_single_layers=2, num_refiner_layers=2, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4), guidance_embeds=True,
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=module.eval(), vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip
    pooled = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2))
    return Pipe(
        pipe, height=32, width=32, num_frames=5, pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1], true_cfg_scale=2.0, **_masked(16),
    )  # fmt: skip


def mochi() -> Pipe:
    module = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8,
        max_sequence_length=TEXT,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None,
        text_encoder=None, tokenizer=None, transformer=module.eval(),
    )  # fmt: skip
    return Pipe(pipe, height=32, width=32, num_frames=7, **_masked(16))


def latte() -> Pipe:
    module = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        caption_channels=16, in_channels=4, cross_attention_dim=16, out_channels=8,
        attention_bias=True, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6, num_embeds_ada_norm=1000, video_length=2,
    )  # fmt: skip
    pipe = diffusers.LattePipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=module.eval(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
    )  # fmt: skip
    return Pipe(pipe, height=32, width=32, video_length=2, negative_prompt=None, **_texts(16))


FAMILIES: dict[str, Callable[[], Pipe]] = {
    "wan": wan, "cogvideox": cogvideox, "ltx": ltx, "hunyuan": hunyuan, "mochi": mochi,
    "latte": latte,
}  # fmt: skip


class Block(nn.Module):
    """Adds `amount` to every number of the hidden stream, and counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)
        self.num_runs = 0

    def forward(self, hidden: torch.Tensor, amount: float) -> torch.Tensor:
        output = hidden + self.layer(torch.full_like(hidden, amount))
        self.num_runs += 1
        return output


class Ramp(nn.Module):
    """A denoiser of three blocks: at step n, with timestep 1000 - n, each adds amounts[n]."""

    def __init__(self, amounts: list[float]) -> None:
        super().__init__()
        self.amounts = amounts
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden = latent if text is None else latent + text
        for block in self.blocks:
            hidden = block(hidden, self.amounts[1000 - int(timestep)])
        return hidden

    @property
    def num_runs(self) -> list[int]:
        return [block.num_runs for block in self.blocks]

    def run(self, latents: list[float] | None = None) -> str:
        """One generation; a mark for every step: how many blocks ran."""
        marks = ""
        for step in range(len(self.amounts)):
            before = sum(self.num_runs)
            value = 10.0 if latents is None else latents[step]
            with torch.no_grad():
                self(torch.full((1, 2, 4), value), torch.tensor(1000.0 - step))
            marks += str(sum(self.num_runs) - before)
        return marks


@pytest.fixture
def ramp() -> type[Ramp]:
    """The class of the denoiser by hand."""
    return Ramp


@pytest.fixture
def make() -> Callable[[str], Pipe]:
    """A pipeline by its family."""

    def made(family: str) -> Pipe:
        torch.manual_seed(0)
        return {**FAMILIES, "wan of two": wan_of_two}[family]()

    return made
