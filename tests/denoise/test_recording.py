"""Calls are recorded as they were made, told apart, read again and split by generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vcompress.calib.calls import Calls, clips_of, load_calls
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.models.call_file import read_calls
from vcompress.models.calls import Call, call_of, run_module
from vcompress.models.load import LoadOptions, wrap_module
from vcompress.models.recording import record_calls
from vcompress.spec.call import CallSpec
from vcompress.spec.errors import InputError


class Denoiser(nn.Module):
    """Latents plus a shift by text, time, table and scale: every argument counts."""

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor] | None = None, scale: tuple[float, float] = (1, 1),
        mask: torch.Tensor | None = None, return_dict: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        shift = text.mean(1, keepdim=True) * scale[0] + timestep.view(-1, 1)
        if table is not None:
            shift = shift + table[0].sum() - table[1].sum()
        return hidden_states + shift


def latents(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def run_pipeline(module: nn.Module, seed: int, times: tuple[float, ...], branches: int = 2) -> None:
    """One generation: the same latents for each branch of a step, other texts."""
    state = latents(seed)
    for time in times:
        for branch in range(branches):
            text = torch.full((1, 3), float(seed + 100 * branch), dtype=torch.bfloat16)
            module(state, timestep=torch.tensor([time]), text=text, return_dict=False)
        state = state * 0.9


def run_sizes(module: nn.Module) -> None:
    """Two generations of different sizes."""
    for size in (5, 6):
        module(latents(0)[:, :size], torch.tensor([5.0]), torch.ones(1, 3))


def test_generations_steps_and_branches_are_told_apart(tmp_path: Path) -> None:
    module = Denoiser()
    with record_calls(module, tmp_path / "calls.pt") as calls:
        run_pipeline(module, 1, (900.0, 500.0, 100.0))
        run_pipeline(module, 2, (900.0, 500.0, 100.0))
        # Distilled to one step: the time never falls.
        run_pipeline(module, 3, (1000.0,))
        run_pipeline(module, 4, (1000.0,))
    places = [(one.generation, one.step, one.branch) for one in calls]
    first = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)]
    assert places[:6] == first
    assert [place[0] for place in places[6:]] == [1] * 6 + [2, 2, 3, 3]
    assert not module._forward_pre_hooks


def test_what_was_recorded_comes_back(tmp_path: Path) -> None:
    module, path = Denoiser(), tmp_path / "calls.pt"
    table = (torch.arange(4.0), torch.ones(4))
    arguments: list[dict[str, Any]] = [
        {
            "hidden_states": latents(seed, 2), "timestep": torch.tensor(900.0 - seed),
            "text": torch.ones(2, 3, dtype=torch.bfloat16), "table": table, "scale": (0.5, 2.0),
        }
        for seed in range(3)
    ]  # fmt: skip
    with record_calls(module, path):
        outputs = [module(**each) for each in arguments]
    data = torch.load(path, weights_only=True)
    assert data["calls"][0]["tensors"]["text"].dtype == torch.bfloat16
    # The text of all calls is one tensor in the file.
    stores = {one["tensors"]["text"].untyped_storage().data_ptr() for one in data["calls"]}
    assert len(stores) == 1
    found = read_calls(path)
    assert found.module_class == "Denoiser"
    call = found.calls[1].call
    # The table has no row a sample; a time without an axis is every sample's.
    assert list(call.tensors) == ["hidden_states", "timestep", "text"]
    assert list(call.shared) == ["table.0", "table.1"]
    assert call.constants == {"scale": (0.5, 2.0)}
    assert call.tensors["timestep"].tolist() == [899.0, 899.0]
    assert torch.equal(run_module(module, call), outputs[1])
    assert CallSpec.from_dict(call.spec.as_dict()).tensors == call.spec.tensors
    samples = load_calls(path)
    assert len(samples) == 6
    (batch,) = samples[1:4].tensors(8)
    assert batch.tensors["text"].dtype == torch.float32
    assert torch.equal(batch.tensors["hidden_states"][0], latents(0, 2)[1])
    assert torch.equal(run_module(module, batch)[1:], outputs[1])


def test_test_calls_come_from_other_generations(tmp_path: Path) -> None:
    module, path = Denoiser(), tmp_path / "calls.pt"
    with record_calls(module, path):
        for seed in range(5):
            run_pipeline(module, seed, (900.0, 600.0, 300.0))
    request = ClipRequest(
        calib=str(path), data=None, num_clips=6, num_test_clips=100, seed=0
    )  # fmt: skip
    sets = open_clip_sets(request, None, ())
    calibration, test = sets.calibration, sets.test
    assert isinstance(calibration, Calls)
    assert isinstance(test, Calls)
    ours, theirs = ({row.generation for row in each.rows} for each in (calibration, test))
    assert len(theirs) == 1
    assert not ours & theirs
    # Few calibration calls, and yet every step is among them.
    assert (len(calibration), {row.step for row in calibration.rows}) == (6, {0, 1, 2})
    assert len(test) == 6
    assert open_clip_sets(request, None, ()).test.digest == test.digest
    assert calibration.digest != test.digest
    with pytest.raises(InputError, match="models of clips"):
        clips_of(test)


def test_steps_can_be_left_out(tmp_path: Path) -> None:
    module = Denoiser()
    with record_calls(module, tmp_path / "calls.pt", every_nth_step=2) as calls:
        run_pipeline(module, 1, (900.0, 500.0, 100.0), branches=1)
    assert [one.step for one in calls] == [0, 2]


def test_a_block_that_fails_writes_nothing(tmp_path: Path) -> None:
    module = Denoiser()
    with pytest.raises(RuntimeError), record_calls(module, tmp_path / "calls.pt"):
        module(latents(0), torch.tensor([5.0]), torch.ones(2, 3, 4))
    assert not list(tmp_path.iterdir())
    assert not module._forward_pre_hooks


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    module, path = Denoiser(), tmp_path / "calls.pt"
    with pytest.raises(InputError, match="at least one call is needed"), record_calls(module, path):
        pass
    with pytest.raises(InputError, match="no such folder"), record_calls(module, path / "x" / "y"):
        pass
    with (
        pytest.raises(InputError, match="same shapes and constants"),
        record_calls(module, path),
    ):
        run_sizes(module)
    linear = nn.Linear(2, 2)
    with pytest.raises(InputError, match="called with one of timestep"), record_calls(linear, path):
        linear(torch.ones(1, 2))
    with pytest.raises(InputError, match="tensors alone or plain values alone"):
        call_of({"x": torch.ones(1), "mixed": (torch.ones(1), 2)})
    with pytest.raises(InputError, match="batch axis"):
        call_of({"flag": True})


def test_what_is_no_file_of_calls_is_said(tmp_path: Path) -> None:
    path = tmp_path / "calls.pt"
    for content in (b"", b"nothing"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a file of recorded calls"):
            read_calls(path)
    torch.save({"clips": torch.ones(1)}, path)
    with pytest.raises(InputError, match="takes several tensors, not clips"):
        read_calls(path)
    torch.save({"kind": "vcompress calls", "calls": [{"tensors": 1}]}, path)
    with pytest.raises(InputError, match="of this version"):
        read_calls(path)
    with pytest.raises(InputError, match="no such file of recorded calls"):
        read_calls(tmp_path)


class Research(Denoiser):
    """The same with two blocks behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor,
        return_dict: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        output = super().forward(hidden_states, timestep, text)
        for stage in self.stages:
            output = stage(output)
        return output


def test_a_research_model_is_loaded_by_its_calls(tmp_path: Path) -> None:
    module, path = Research(), tmp_path / "calls.pt"
    with record_calls(module, path):
        run_pipeline(module, 1, (900.0, 500.0))
    model = wrap_module(module, name="research", options=LoadOptions(calls=path))
    assert (model.task, model.blocks) == ("denoise", ("stages.0", "stages.1"))
    assert str(model.inputs) == "hidden_states [B, 6], timestep [B], text [B, 3]"
    with pytest.raises(InputError, match="research takes no clips but hidden_states"):
        _ = model.clip
    torch.save({"clips": torch.ones(1)}, path)
    with pytest.raises(InputError, match="no adapter knows this model"):
        wrap_module(module, name="research", options=LoadOptions(calls=path))


def test_one_generation_is_not_enough(tmp_path: Path) -> None:
    module, path = Denoiser(), tmp_path / "calls.pt"
    with record_calls(module, path):
        run_pipeline(module, 1, (900.0, 500.0))
    with pytest.raises(InputError, match="with several prompts or seeds"):
        load_calls(path).split(0.25, 0)


def test_nested_arguments_are_put_together_again() -> None:
    call = call_of({"x": torch.ones(2, 1), "pair": {"k": torch.ones(3), "v": torch.zeros(3)}})
    assert list(call.flat) == ["x", "pair.k", "pair.v"]
    assert call.arguments["pair"]["k"].tolist() == [1, 1, 1]
    assert isinstance(call, Call)
    assert len(call[:1].repeated(3)) == 3
