"""A diffusers pipeline whose denoiser computes in a runtime, with a cache: request by request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from google.protobuf import text_format
from torch import nn
from tritonclient.grpc import model_config_pb2

from vcompress.benchmarks.denoiser_zoo import build
from vcompress.cli import cli
from vcompress.export.runtime import open_session
from vcompress.models.recording import record_calls
from vcompress.pipeline import Options, quantize
from vcompress.pipeline.compressed import compressed
from vcompress.pipeline.planning import save_plan
from vcompress.pipeline.serving import export_for_server
from vcompress.spec.artifact import sha256_of
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
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block in INT8 with its cache."""
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
    return folder / "out"


@pytest.fixture(scope="module")
def module(artifact: Path) -> nn.Module:
    """It in ONNX Runtime."""
    return compressed(artifact, runtime="onnxruntime", threads=1)


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


class Sequences:
    """What Triton does with requests of sequences, by the configuration that it would read."""

    def __init__(self, folder: Path) -> None:
        config = model_config_pb2.ModelConfig()
        text_format.Parse((folder / "config.pbtxt").read_text(), config)
        assert config.backend == "onnxruntime"
        assert config.max_batch_size == 0, "sizes are those of the graph"
        self.inputs = {one.name: tuple(one.dims) for one in config.input}
        (self.output,) = (one.name for one in config.output)
        self.states = list(config.sequence_batching.state)
        self.folder, self.kept = folder, dict[int, dict[str, Any]]()
        self.session = open_session(folder / "1" / "model.onnx", threads=1)
        assert {*self.inputs, *(one.input_name for one in self.states)} == {
            *self.session.input_names
        }

    def request(self, sequence: int, inputs: dict[str, Any], *, start: bool) -> Any:
        if start:
            self.kept[sequence] = {one.input_name: self._initial(one) for one in self.states}
        assert {name: value.shape for name, value in inputs.items()} == self.inputs
        outputs = self.session.run_named({**inputs, **self.kept[sequence]})
        self.kept[sequence] = {one.input_name: outputs[one.output_name] for one in self.states}
        return outputs[self.output]

    def _initial(self, state: Any) -> Any:
        (start,) = state.initial_state
        assert (start.data_type, list(start.dims)) == (state.data_type, list(state.dims))
        dtype = {
            model_config_pb2.TYPE_FP32: np.float32, model_config_pb2.TYPE_INT64: np.int64,
            model_config_pb2.TYPE_BOOL: np.bool_,
        }[state.data_type]  # fmt: skip
        data = (self.folder / "initial_state" / start.data_file).read_bytes()
        return np.frombuffer(data, dtype).reshape(tuple(start.dims))


def test_triton_keeps_what_the_cache_keeps(artifact: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    arguments = ["export", str(artifact), "--to", "triton", "-o", str(repository)]
    CliRunner().invoke(cli, arguments, catch_exceptions=False)
    (folder,) = repository.iterdir()
    server = Sequences(folder)
    expected = compressed(artifact)
    calls: list[dict[str, Any]] = []
    outputs: list[torch.Tensor] = []

    def note(_module: nn.Module, _given: Any, keywords: dict[str, Any], output: Any) -> None:
        calls.append({
            name: value.numpy() for name, value in keywords.items()
            if isinstance(value, torch.Tensor)
        })  # fmt: skip
        outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    expected.register_forward_hook(note, with_kwargs=True)
    for seed in (1, 2):
        generate(expected, seed)
    assert len(calls) == 2 * 2 * STEPS
    for number, (call, wanted) in enumerate(zip(calls, outputs, strict=True)):
        step = number // 2 % STEPS
        got = server.request(number % 2, {"step": np.array([step]), **call}, start=step == 0)
        np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_a_cache_that_no_graph_has_is_refused(artifact: Path, tmp_path: Path) -> None:
    copied = tmp_path / "out"
    shutil.copytree(artifact, copied)
    plan = json.loads((copied / "plan.json").read_text())
    plan["cache"] = CacheSection(policy="easycache", threshold=0.1, num_steps=STEPS).as_dict()
    (copied / "plan.json").write_text(json.dumps(plan))
    manifest = json.loads((copied / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "plan.json":
            entry["sha256"] = sha256_of(copied / "plan.json")
            entry["bytes"] = (copied / "plan.json").stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="easycache cannot stand in a graph"):
        export_for_server(copied, tmp_path / "repository", "triton")
    assert not (tmp_path / "repository").exists()
