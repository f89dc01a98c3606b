"""A compressed denoiser goes back into its pipeline, which goes on as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import vcompress
from vcompress.benchmarks.denoiser_zoo import artifact_of
from vcompress.calib.calls import load_calls
from vcompress.cli import cli
from vcompress.compress.frozen import FrozenLayer
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.recording import record_calls
from vcompress.pipeline.cache import cached
from vcompress.pipeline.compressed import compressed
from vcompress.pipeline.revalidate import validate
from vcompress.spec.artifact import Artifact
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.dynamic_section import DynamicSection, ErrorLine
from vcompress.spec.errors import InputError

# What diffusers and torch say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
WAN = "WanTransformer3DModel"


def pipeline(first: nn.Module, second: nn.Module) -> Any:
    """Wan 2.2: one transformer for much noise, one for little."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    made = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=first,
        transformer_2=second, boundary_ratio=0.875,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def generate(
    pipe: Any, seed: int, dtype: torch.dtype = torch.float32, *, num_steps: int = 5
) -> torch.Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, 8, 32, generator=generator).to(dtype)
    frames: torch.Tensor = pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=64, width=64, num_frames=9,
        num_inference_steps=num_steps, guidance_scale=4.0, output_type="latent",
        generator=generator,
    ).frames  # fmt: skip
    return frames


def test_without_quantization_the_pipeline_gives_the_same_bits(zoo: Any, tmp_path: Path) -> None:
    original, model = zoo.build(WAN), zoo.load(WAN)
    artifact_of(model, zoo.calls(WAN), "keep", tmp_path / "out")
    restored = compressed(tmp_path / "out")
    assert type(restored) is type(original)
    expected = generate(pipeline(original, original), 3)
    assert expected.std() > 0
    assert torch.equal(generate(pipeline(restored, restored), 3), expected)


@pytest.mark.parametrize("name", [WAN, "LatteTransformer3DModel", "HunyuanVideoTransformer3DModel"])
def test_a_compressed_module_is_the_planned_one(zoo: Any, name: str, tmp_path: Path) -> None:
    model = zoo.load(name)
    planned = artifact_of(model, zoo.calls(name), "nvfp4", tmp_path / "out")
    restored = compressed(tmp_path / "out")
    frozen = [each for each in restored.modules() if isinstance(each, FrozenLayer)]
    assert len(frozen) > 0.8 * len(model.layers)
    arguments = zoo.arguments(name, 5, 600.0)
    with torch.inference_mode():
        output = restored(**arguments, return_dict=False)[0]
        expected = planned.module(**arguments, return_dict=False)[0]
        unquantized = model.module(**arguments, return_dict=False)[0]
    assert torch.equal(output, expected)
    assert not torch.allclose(output, unquantized, rtol=1e-3)
    # Four bits and an eight-bit scale for 16 values; nothing of them is there in float.
    packed = sum(layer.weight_bits for layer in frozen)
    assert packed < 4.51 * sum(layer.weight.numel() for layer in frozen) + 32 * len(frozen)


def test_both_transformers_of_wan_in_their_pipeline(zoo: Any, tmp_path: Path) -> None:
    model = zoo.load(WAN)
    planned = artifact_of(model, zoo.calls(WAN), "int8", tmp_path / "out")
    pipe = pipeline(compressed(tmp_path / "out"), compressed(tmp_path / "out"))
    with record_calls(pipe.transformer, tmp_path / "calls.pt") as calls:
        latents = generate(pipe, 1)
    assert calls[0].call.spec.tensors[0].name == "hidden_states"
    torch.testing.assert_close(generate(pipeline(planned.module, planned.module), 1), latents)
    assert not torch.allclose(generate(pipeline(model.module, model.module), 1), latents)
    # In bfloat16 too, as pipelines run; weights stay packed.
    half = compressed(tmp_path / "out", dtype=torch.bfloat16)
    assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu")
    assert half.blocks[0].attn1.to_q.weight_quantized.dtype == torch.int8
    frames = generate(pipeline(half, half), 1, torch.bfloat16)
    assert (frames.float() - latents).norm() < 0.1 * latents.norm()


def test_the_cache_of_a_plan_runs_in_the_pipeline(zoo: Any, tmp_path: Path) -> None:
    section = CacheSection(policy="fixed", interval=2, num_steps=10)
    artifact_of(zoo.load(WAN), zoo.calls(WAN), "nvfp4", tmp_path / "out", cache=section)
    pipe = pipeline(compressed(tmp_path / "out"), compressed(tmp_path / "out"))
    latents = generate(pipe, 1, num_steps=10)
    for module in (pipe.transformer, pipe.transformer_2):
        report = module.vcompress_cache.report()
        assert report.consulted.any()
    assert report.hits.any()
    # A second run starts afresh.
    assert torch.equal(generate(pipe, 1, num_steps=10), latents)
    with pytest.raises(InputError, match="decides about blocks"):
        compressed(tmp_path / "out", runtime="onnxruntime")
    # One cache for both, from the artifact.
    with cached(pipe, tmp_path / "out") as handle:
        again = generate(pipe, 1, num_steps=10)
    assert set(handle.report().blocks) >= {"transformer.blocks.0", "transformer_2.blocks.0"}
    assert torch.isfinite(again).all()


def test_the_precision_of_a_plan_changes_in_the_pipeline(zoo: Any, tmp_path: Path) -> None:
    model = zoo.load(WAN)
    section = DynamicSection(
        signal="moved", threshold=0.5, num_steps=10, protect_last=1,
        blocks={name: ErrorLine(alpha=1.0, beta=0.0) for name in model.blocks},
    )  # fmt: skip
    artifact_of(
        model, zoo.calls(WAN), "nvfp4", tmp_path / "out", dynamic=section,
        cache=CacheSection(policy="fixed", interval=3, num_steps=10),
    )  # fmt: skip
    module = compressed(tmp_path / "out")
    pipe = pipeline(module, module)
    pipe.register_modules(transformer_2=None)
    pipe.register_to_config(boundary_ratio=None)
    latents = generate(pipe, 1, num_steps=10)
    report = module.vcompress_dynamic.report()
    assert report.num_generations == module.vcompress_cache.report().num_generations == 1
    reused = module.vcompress_cache.report().hits > 0
    rate = report.rate()
    # What was left out did no work; behind it, in the first step and in the last all is fine.
    assert (report.work.sum(-1) == 0)[reused].all()
    fine = [0, 9, *(step + 1 for step in range(9) if reused[0, step] and not reused[0, step + 1])]
    assert (rate[:, fine] == 0).all()
    assert report.share > 0
    assert report.pinned > 0
    assert torch.equal(generate(pipe, 1, num_steps=10), latents)
    assert module.vcompress_dynamic.report().work.tolist() == (2 * report.work).tolist()
    for keywords in ({"runtime": "onnxruntime"}, {"execute": True}):
        with pytest.raises(InputError, match="simulated in torch only"):
            compressed(tmp_path / "out", **keywords)


def test_weights_go_back_to_the_type_that_they_came_in(zoo: Any, tmp_path: Path) -> None:
    module = zoo.build(WAN).to(torch.bfloat16)
    module.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), LoadOptions(calls=zoo.calls(WAN)))
    artifact_of(model, zoo.calls(WAN), "nvfp4", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    name = "blocks.0.attn1.norm_q.weight"
    assert stored[name].dtype == torch.bfloat16
    restored = compressed(tmp_path / "out")
    assert restored.dtype == torch.bfloat16
    assert torch.equal(restored.state_dict()[name], module.state_dict()[name])
    # The class wants these in float32 whatever the rest is in.
    assert restored.scale_shift_table.dtype == torch.float32
    config, quantized = restored.config, restored.condition_embedder.time_proj
    assert (config["num_layers"], quantized.format) == (2, "nvfp4")


def test_files_that_were_changed_are_refused(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    artifact_of(zoo.load(WAN), zoo.calls(WAN), "int8", folder)
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="was changed since the artifact was made"):
        compressed(folder)
    with pytest.raises(InputError, match="is not an artifact"):
        compressed(tmp_path)


def test_quantize_from_the_command(zoo: Any, tmp_path: Path) -> None:
    model, calls, out = tmp_path / "wan", zoo.calls(WAN), tmp_path / "out"
    # One block: exports take seconds a block.
    zoo.build(WAN, 1).save_pretrained(model)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["quantize", str(model), "--target", "nvfp4", *arguments])

    for arguments, text in (
        ((), "calibration clips are needed"),
        (("--calib", str(tmp_path)), "no such file of recorded calls"),
        (("--calib", str(calls), "--max-drop", "1"), "task of wan is denoise"),
        (("--calib", str(calls), "--tokens", "0.5"), "tokens cannot be reduced"),
    ):
        refused = run(*arguments)
        assert isinstance(refused.exception, InputError)
        assert text in str(refused.exception)
    result = run("--calib", str(calls), "--min-sqnr", "15", "--no-engine", "--max-layer-error",
                 "0.2", "--output", str(out), "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "gate 15.00 dB: pass" in result.output
    artifact = Artifact.open(out, verify_hashes=True)
    assert [one["name"] for one in artifact.manifest["inputs"]] == [
        "hidden_states", "timestep", "encoder_hidden_states"
    ]  # fmt: skip
    assert artifact.manifest["precision"]["layers"]["nvfp4"] >= 10
    assert not any(key.startswith("_name") for key in json.loads((out / "config.json").read_text()))
    again = validate(out)
    assert (again.passed, again.golden_relative_l2) == (True, 0.0)
    assert again.verdict.sqnr_db == pytest.approx(artifact.manifest["quality"]["result"])
    restored = compressed(out)
    recorded = list(load_calls(calls).tensors(1))
    with torch.inference_mode():
        outputs = [restored(**call.arguments, return_dict=False)[0] for call in recorded]
    assert all(bool(output.isfinite().all()) for output in outputs)
    # The same calls in a runtime, which is all that computes then.
    graph = compressed(out, runtime="onnxruntime", threads=1)
    assert not list(graph.parameters())
    # A value between two codes may go either way, see `docs/architecture.md`.
    for call, output in zip(recorded, outputs, strict=True):
        assert (graph(**call.arguments).sample - output).norm() < 0.02 * output.norm()
    with pytest.raises(InputError, match="hidden_states, got"):
        graph(**{**recorded[0].arguments, "hidden_states": torch.zeros(1, 4, 1, 2, 2)})
    with pytest.raises(InputError, match="leave out dtype"):
        compressed(out, runtime="onnxruntime", dtype=torch.bfloat16)
    shown = CliRunner().invoke(cli, ["inspect", str(model)])
    assert "hidden_states, timestep, encoder_hidden_states" in shown.output


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_an_executed_module_is_the_planned_one(zoo: Any, format: str, tmp_path: Path) -> None:
    model = zoo.load(WAN)
    planned = artifact_of(model, zoo.calls(WAN), format, tmp_path / "out")
    executed = compressed(tmp_path / "out", execute=True)
    arguments = zoo.arguments(WAN, 5, 600.0)
    with torch.inference_mode():
        output, expected, unquantized = (
            each(**arguments, return_dict=False)[0]
            for each in (executed, planned.module, model.module)
        )
    # Sums in another order move a few values to the next code.
    assert (output - expected).norm() < 0.05 * (expected - unquantized).norm()
    kernels = {each.kernel.partition(",")[0] for each in vcompress.execute(executed)}
    inputs = "int8" if format == "int8" else "nvfp4 in bfloat16"
    assert f"{format} x {inputs}" in kernels
