"""Dynamic precision on a denoiser of one block, whose signals and decisions are known by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.compress.dynamic import DynamicSection, ErrorLine, apply_dynamic
from vcompress.compress.frozen import FrozenLinear, freeze
from vcompress.compress.kernels.execute import execute
from vcompress.spec.errors import InputError

SECTION = DynamicSection(
    signal="added", threshold=0.5, num_steps=8, blocks={"blocks.0": ErrorLine(alpha=1.0, beta=0.0)}
)


class Block(nn.Module):
    """Adds `gain` times its input, through an NVFP4 layer that is the identity."""

    def __init__(self) -> None:
        super().__init__()
        plain = nn.Linear(16, 16, bias=False)
        plain.weight.data = torch.eye(16)
        self.layer: nn.Module = freeze(plain, "nvfp4", 6.0)
        self.gain = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.gain * self.layer(hidden_states)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, hidden_states: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.blocks[0](hidden_states)


@pytest.fixture
def model() -> Denoiser:
    return Denoiser().eval()


def formats(model: Denoiser, latents: list[torch.Tensor], *, start: float = 8) -> list[str]:
    """The format of the layer's input in each step, one call a step."""
    found = []
    for step, latent in enumerate(latents):
        model(latent, start - step)
        found.append(layer(model).input_format)
    return found


def layer(model: Denoiser) -> FrozenLinear:
    found = model.blocks[0].layer
    assert isinstance(found, FrozenLinear)
    return found


def ones(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 2, 16), float(value)) for value in values]


def test_what_the_block_added_a_step_before_decides(model: Denoiser) -> None:
    # Adds as much as it was given: a signal of 1, then, with a gain of 0.25, one of 0.25.
    with apply_dynamic(model, SECTION) as handle:
        assert formats(model, ones(1, 1)) == ["int8_token", "int8_token"]
        model.blocks[0].gain = 0.25
        assert formats(model, ones(1, 1), start=6) == ["int8_token", "nvfp4"]
        report = handle.report()
    assert layer(model).input_format == "nvfp4"
    # 32 elements times 16 channels a step.
    assert report.work.tolist() == [[[0, 512, 0]] * 3 + [[512, 0, 0]]]
    assert report.share == report.linear_share == 0.25
    assert report.mean_bits == 7
    assert (report.pinned, report.block_calls) == (0, 4)
    assert str(report).endswith("###.")


def test_how_far_the_input_has_moved_decides(model: Denoiser) -> None:
    section = replace(SECTION, signal="moved", threshold=0.15)
    with apply_dynamic(model, section):
        # Moves of 0.1, 0.2 / 1.1 and 0.
        assert formats(model, ones(1, 1.1, 1.3, 1.3)) == [
            "int8_token", "nvfp4", "int8_token", "nvfp4",
        ]  # fmt: skip


def test_steps_at_the_ends_are_protected(model: Denoiser) -> None:
    section = replace(SECTION, threshold=9.0, protect_first=3, protect_last=2)
    with apply_dynamic(model, section):
        kinds = [name == "nvfp4" for name in formats(model, ones(*[1.0] * 8))]
    assert kinds == [False] * 3 + [True] * 3 + [False] * 2


def test_without_a_signal_a_block_is_what_it_is_in_every_step(model: Denoiser) -> None:
    with apply_dynamic(model, replace(SECTION, signal="none", threshold=0.0)):
        assert formats(model, ones(1, 1)) == ["nvfp4", "nvfp4"]


def test_branches_know_nothing_of_each_other(model: Denoiser) -> None:
    model.blocks[0].gain = 0.25
    with apply_dynamic(model, SECTION) as handle:
        found = []
        for step in range(2):
            for gain in (0.25, 1.0):
                model.blocks[0].gain = gain
                model(ones(1)[0], 8 - step)
                found.append(layer(model).input_format)
        # Only the branch that added little has four bits.
        assert found == ["int8_token", "int8_token", "nvfp4", "int8_token"]
        assert handle.report().num_generations == 1


@pytest.mark.parametrize("how", ["timestep", "noise", "reset", "abort", "shape"])
def test_another_generation_begins_with_nothing(model: Denoiser, how: str) -> None:
    model.blocks[0].gain = 0.25
    latent, start = ones(1)[0], 6.0
    with apply_dynamic(model, SECTION) as handle:
        assert formats(model, ones(1, 1))[-1] == "nvfp4"
        if how == "timestep":
            start = 8.0
        elif how == "noise":
            latent = -latent
        elif how == "reset":
            handle.reset()
        elif how == "shape":
            latent = torch.ones(1, 4, 16)
        else:
            with pytest.raises(RuntimeError):
                model(torch.ones(1, 2, 5), 6.5)
        assert formats(model, [latent], start=start) == ["int8_token"]
        assert handle.counted().num_generations >= 2


def test_the_step_after_one_that_was_left_out_has_fine_inputs(model: Denoiser) -> None:
    model.blocks[0].gain = 0.25
    reuse = CacheSection(
        policy="fixed", interval=3, num_steps=9, protect_first=1, protect_last=0,
        blocks=("blocks.0",),
    )  # fmt: skip
    with apply_dynamic(model, SECTION) as handle, apply_cache(model, reuse) as cached:
        formats(model, ones(*[1.0] * 9), start=9)
        computed = [not hit for hit in cached.report().hits[0]]
        report = handle.counted()
    steps = [step for step, is_computed in enumerate(computed) if is_computed]
    assert steps
    assert len(steps) < 9
    for step in steps[1:]:
        is_pinned = step - 1 not in steps
        assert report.work[0, step, 1 if is_pinned else 0] == 512
    assert report.pinned == sum(step - 1 not in steps for step in steps[1:])


def test_outliers_are_not_rounded_where_a_cache_keeps_them(model: Denoiser) -> None:
    reuse = CacheSection(
        policy="fixed", interval=2, num_steps=8, protect_first=1, protect_last=0,
        blocks=("blocks.0",),
    )  # fmt: skip
    outlier = torch.full((1, 2, 16), 0.1)
    outlier[0, 0, 0] = 6.0
    # 6 against a mean of (6 + 31 * 0.1) / 32 is 21 times as much.
    for largest, expected in ((20.0, "keep"), (22.0, "int8_token")):
        section = replace(SECTION, threshold=-1.0, outlier_ratio=largest)
        with apply_cache(model, reuse), apply_dynamic(model, section):
            assert formats(model, [outlier]) == [expected]
    with apply_dynamic(model, replace(SECTION, threshold=-1.0, outlier_ratio=20.0)):
        assert formats(model, [outlier]) == ["int8_token"]


def test_four_bits_change_what_is_computed_as_the_format_does(model: Denoiser) -> None:
    latent = torch.linspace(-1, 1, 32).reshape(1, 2, 16)
    expected = model(latent, 0.0)
    with apply_dynamic(model, replace(SECTION, signal="none", threshold=1.0)):
        assert torch.equal(model(latent, 8.0), expected)
    with apply_dynamic(model, replace(SECTION, signal="none", threshold=-1.0)):
        fine = model(latent, 8.0)
    assert (fine - 2 * latent).norm() < 0.2 * (expected - 2 * latent).norm()
    assert torch.equal(model(latent, 0.0), expected)


def test_a_copy_is_independent(model: Denoiser) -> None:
    model.blocks[0].gain = 0.25
    model.__dict__["handle"] = apply_dynamic(model, SECTION)
    other = copy.deepcopy(model)
    assert formats(model, ones(1, 1))[-1] == "nvfp4"
    assert formats(other, ones(1), start=6) == ["int8_token"]
    assert other.__dict__["handle"].counted().num_generations == 1
    assert model.__dict__["handle"].counted().num_generations == 1


def test_what_cannot_work_is_said(model: Denoiser) -> None:
    with apply_dynamic(model, SECTION) as handle, pytest.raises(InputError, match="never asked"):
        handle.report()
    with apply_dynamic(model, replace(SECTION, threshold=-1.0)) as handle:
        formats(model, ones(1))
        with pytest.warns(UserWarning, match="no input to four bits"):
            handle.report()
    layer(model).format = "int8"
    with pytest.raises(InputError, match=r"blocks\.0 has no layer in nvfp4"):
        apply_dynamic(model, SECTION)


def test_a_block_that_is_not_there_is_named_as_the_plan_names_it(model: Denoiser) -> None:
    section = replace(SECTION, blocks={"blocks.7": ErrorLine(alpha=1.0, beta=0.0)})
    with pytest.raises(InputError, match=r"dynamic_precision\.blocks: no module 'blocks\.7'"):
        apply_dynamic(model, section)


def test_it_is_applied_once(model: Denoiser) -> None:
    with apply_dynamic(model, SECTION) as handle:
        # Four bits in its last step: the format of its input is that of a layer left alone.
        model.blocks[0].gain = 0.25
        assert formats(model, ones(1, 1))[-1] == "nvfp4"
        with pytest.raises(InputError, match="has dynamic precision already"):
            apply_dynamic(model, SECTION)
        assert formats(model, ones(1), start=6) == ["nvfp4"]
        assert handle.counted().block_calls == 3
    apply_dynamic(model, SECTION).remove()


def test_packed_layers_on_kernels_do_not_follow_it(model: Denoiser) -> None:
    with apply_dynamic(model, SECTION), pytest.raises(InputError, match="dynamic precision"):
        execute(model)
    # Refused, not half done.
    assert type(layer(model)) is FrozenLinear
    execute(model)
    with pytest.raises(InputError, match="simulated"):
        apply_dynamic(model, SECTION)
    assert not model._forward_pre_hooks
