"""A diffusers pipeline whose denoiser computes in a runtime, with a cache: request by request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from vcompress.benchmarks.denoiser_zoo import build
from vcompress.models.recording import record_calls
from vcompress.pipeline import Options, quantize
from vcompress.pipeline.compressed import compressed
from vcompress.pipeline.planning import save_plan
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
STEPS = 8
COMPUTED = (0, 1, 2, 5, 7)
# A reused step gives its branch's last output once more.
SECTION = CacheSection(
    policy="forecast", num_steps=STEPS, protect_first=0, protect_last=0, compute_steps=COMPUTED,
    mixture=tuple(() if step in COMPUTED else (1.0,) for step in range(STEPS)),
)  # fmt: skip

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def generate(
    module: nn.Module, seed: int, *, size: int = 32, on_step: Callback | None = None
) -> torch.Tensor:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe: Any = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=module
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, 8, 32, generator=generator)
    latents: torch.Tensor = pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=size, width=size,
        num_frames=5, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        generator=generator, callback_on_step_end=on_step,
    ).frames  # fmt: skip
    return latents


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """One block in INT8 with its cache, in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("runtime")
    original = build("WanTransformer3DModel", 1)
    with record_calls(original, folder / "calls.pt"):
        # One to calibrate on, one to test.
        for seed in range(2):
            generate(original, seed)
    original.save_pretrained(folder / "wan")  # type: ignore[operator]
    plan = CompressionPlan(
        target="mixed", seed=0, model={"name": "wan", "task": "denoise"}, quantize={}, evidence={},
        cache=SECTION,
    )  # fmt: skip
    save_plan(plan, {}, folder / "cache.json")
    options = Options(
        target="int8", calib=str(folder / "calls.pt"), output=folder / "out", engine=False,
        cache=str(folder / "cache.json"), max_layer_error=0.2,
    )  # fmt: skip
    quantize(str(folder / "wan"), options=options)
    return compressed(folder / "out", runtime="onnxruntime", threads=1)


def test_two_branches_of_guidance_keep_their_own(module: nn.Module) -> None:
    outputs: list[torch.Tensor] = []
    hook = module.register_forward_hook(
        lambda _module, _given, output: outputs.append(
            output[0] if isinstance(output, tuple) else output.sample
        )
    )
    generate(module, 1)
    hook.remove()
    report = module.__dict__["vcompress_cache"].report()
    assert report.skip_rate == pytest.approx(1 - len(COMPUTED) / STEPS)
    with_text, without = outputs[0::2], outputs[1::2]
    assert len(with_text) == len(without) == STEPS
    for step in range(1, STEPS):
        is_computed = step in COMPUTED
        for own, other in ((with_text, without), (without, with_text)):
            assert torch.equal(own[step], own[step - 1]) is not is_computed
            assert not torch.equal(own[step], other[step - 1])


def test_an_aborted_generation_leaves_the_next_one_right(module: nn.Module) -> None:
    expected, another = generate(module, 1), generate(module, 2)
    assert not torch.equal(expected, another)

    def abort(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        # Step 3 reused; step 4 would as well.
        if step == 3:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt):
        generate(module, 2, on_step=abort)
    assert torch.equal(generate(module, 1), expected)


def test_another_size_is_refused_and_leaves_the_next_one_right(module: nn.Module) -> None:
    expected = generate(module, 1)
    text = r"4, 2, 4, 4\] as hidden_states, got .* 8, 8\]; generate at"
    with pytest.raises(InputError, match=text):
        generate(module, 1, size=64)
    assert torch.equal(generate(module, 1), expected)
