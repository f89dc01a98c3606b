from __future__ import annotations

import pytest
import torch
from torch import nn

from vcompress.compress.algorithms.problem import LayerProblem, output_error
from vcompress.compress.algorithms.select import guarded, plain
from vcompress.compress.frozen import freeze
from vcompress.compress.modelopt_bridge import ALGORITHMS, Calibration, calibrate
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.spec.plan import LayerFacts


class Small(nn.Module):
    """Two linear layers behind outlier channels, and one that no clip reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 64)
        self.second = nn.Linear(64, 32, bias=False)
        self.unreached = nn.Linear(64, 32)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(clips.flatten(1))))


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    values = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    values[:, 7::31] *= 12.0
    return values


@pytest.fixture(scope="module")
def model() -> VideoModel:
    torch.manual_seed(0)
    module = Small().eval()
    layers = {
        name: LayerFacts(kind="linear", weight_shape=tuple(layer.weight.shape))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return VideoModel(
        name="small", module=module, family="generic", task="generic", layers=layers, blocks=(),
        inputs=ClipSpec(num_frames=2, height=4, width=4),
    )  # fmt: skip


def calibrated(model: VideoModel, clips: torch.Tensor, format: str, algorithm: str) -> Calibration:
    def run(subject: VideoModel) -> None:
        for batch in clips.split(50):
            subject(batch)

    return calibrate(model, dict.fromkeys(model.layers, format), algorithm, run)


def first_problem(model: VideoModel, clips: torch.Tensor, format: str) -> LayerProblem:
    layer = model.layer("first")
    assert isinstance(layer, nn.Linear)
    return LayerProblem(
        weight=layer.weight.detach(), bias=layer.bias.detach(), inputs=clips,
        input_amax=float(clips.abs().amax()), format=format,
    )  # fmt: skip


@pytest.mark.parametrize("format", ["nvfp4", "int8", "fp8"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_gives_tensors_that_freeze(
    model: VideoModel,
    clips: torch.Tensor,
    format: str,
    algorithm: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = calibrated(model, clips, format, algorithm)
    assert set(found.input_amax) == {"first", "second"}
    for name in found.input_amax:
        solution = found.solution(name)
        freeze(model.layer(name), format, solution.input_amax, tensors=solution.tensors, name=name)
    error = output_error(first_problem(model, clips, format), found.solution("first"), clips)
    assert error < {"nvfp4": 0.2, "int8": 0.1, "fp8": 0.05}[format]
    assert all(torch.equal(model.module.state_dict()[name], before[name]) for name in before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("algorithm", "format", "parts"),
    [
        ("modelopt-max", "nvfp4", set()),
        ("modelopt-mse", "nvfp4", {"weight_packed", "weight_block_scale", "weight_tensor_scale"}),
        ("modelopt-gptq", "int8", {"weight_quantized", "weight_scale"}),
        ("smoothquant", "int8", {"input_smoothing"}),
        ("awq", "nvfp4", {"input_smoothing"}),
        ("svdquant", "nvfp4", {"input_smoothing", "low_rank_down", "low_rank_up"}),
    ],
)
def test_parts(
    model: VideoModel, clips: torch.Tensor, algorithm: str, format: str, parts: set[str]
) -> None:
    found = calibrated(model, clips, format, algorithm)
    assert set(found.tensors.get("first", {})) == parts
    assert set(found.smoothing) == ({"first", "second"} if "input_smoothing" in parts else set())


@pytest.mark.parametrize("format", ["nvfp4", "int8", "fp8"])
@pytest.mark.parametrize("algorithm", ["modelopt-gptq", "svdquant"])
def test_weights_on_the_way_lower_the_error(
    model: VideoModel, clips: torch.Tensor, format: str, algorithm: str
) -> None:
    problem = first_problem(model, clips, format)
    found = calibrated(model, clips, format, algorithm).solution("first")
    assert output_error(problem, found, clips) < output_error(problem, plain(problem), clips)


def test_what_is_broken_in_modelopt_comes_back_as_it_is(
    model: VideoModel, clips: torch.Tensor
) -> None:
    found = calibrated(model, clips, "nvfp4", "svdquant")
    found.tensors["first"]["low_rank_up"][0, 0] = torch.nan
    problem = first_problem(model, clips, "nvfp4")
    answer = guarded(problem, found.solution("first"), clips)
    assert answer.tensors == {}
    assert answer.note.startswith("modelopt svdquant not used: no finite output")


def test_an_unknown_algorithm(model: VideoModel, clips: torch.Tensor) -> None:
    with pytest.raises(InputError, match="unknown algorithm 'magic'"):
        calibrated(model, clips, "nvfp4", "magic")


@pytest.mark.parametrize("algorithm", ["modelopt-gptq", "modelopt-mse"])
def test_weights_of_formats_that_modelopt_does_not_store_are_left_out(
    model: VideoModel, clips: torch.Tensor, algorithm: str
) -> None:
    found = calibrated(model, clips, "mxfp4", algorithm)
    assert found.input_amax == {}
    assert found.tensors == {}
    # Factors for the channels of the input serve any format.
    assert calibrated(model, clips, "mxfp4", "awq").smoothing
