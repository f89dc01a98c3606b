"""Which output of a block carries on which argument, for models that nobody has named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.spec.errors import InputError

ALWAYS = CacheSection(
    policy="fixed", interval=99, num_steps=9, protect_first=0, protect_last=0
)  # fmt: skip


class Part(nn.Module):
    """A block with a layer in it, so that it is found as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class Joint(Part):
    """Returns text first, takes it last; both streams have the same shape."""

    def forward(self, video: Any, time: float, text: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return text + 10 * time, video + time


class JointModel(nn.Module):
    def __init__(self, glue: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(3))
        self.glue = glue

    def forward(self, latent: torch.Tensor, timestep: float) -> torch.Tensor:
        video, text = latent, torch.zeros_like(latent)
        for block in self.blocks:
            text, video = block(video, time=1001 - timestep, text=text)
            if self.glue:
                video, text = video * 2, text.clone()
        return video + text


def test_streams_are_followed_and_not_guessed_from_their_order() -> None:
    model = JointModel(glue=False)
    apply_cache(model, ALWAYS)
    with torch.no_grad():
        first = model(torch.full((1, 2, 4), 5.0), 1000.0)
        later = model(torch.full((1, 2, 4), 6.0), 999.0)
    # 5 + 3 of video and 30 of text; later the video is 6, and both add what they did.
    assert (float(first.mean()), float(later.mean())) == (38, 39)


class Hinting(Part):
    """Returns a hint that carries on nothing, and a stream of the same shape."""

    def forward(self, stream: torch.Tensor, time: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(stream, 100 * time), stream + time


class HintingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Hinting() for _ in range(3))

    def forward(self, latent: torch.Tensor, timestep: float) -> torch.Tensor:
        total, stream = torch.zeros_like(latent), latent
        for block in self.blocks:
            hint, stream = block(stream, 1001 - timestep)
            total = total + hint
        return total + stream


def test_an_output_that_carries_on_nothing_is_kept_whole() -> None:
    model = HintingModel()
    apply_cache(model, ALWAYS)
    with torch.no_grad():
        first = model(torch.full((1, 2, 4), 5.0), 1000.0)
        later = model(torch.full((1, 2, 4), 6.0), 999.0)
    assert (float(first.mean()), float(later.mean())) == (300 + 5 + 3, 300 + 6 + 3)


class Turned(nn.Module):
    """Alternates between two lists and turns the tokens in between, as Latte does."""

    def __init__(self) -> None:
        super().__init__()
        self.over_space = nn.ModuleList(Plain() for _ in range(2))
        self.over_time = nn.ModuleList(Plain() for _ in range(2))

    def forward(self, latent: torch.Tensor, timestep: float) -> torch.Tensor:
        hidden = latent
        for space, time in zip(self.over_space, self.over_time, strict=True):
            hidden = space(hidden, 1001 - timestep).transpose(0, 1) + 100
            hidden = time(hidden, 1001 - timestep).transpose(0, 1)
        return hidden


class Plain(Part):
    def forward(self, hidden: torch.Tensor, time: float) -> torch.Tensor:
        return hidden + time


def test_work_on_tokens_between_blocks_is_done_in_reused_steps_too() -> None:
    model = Turned()
    cached = apply_cache(model, ALWAYS)
    with torch.no_grad():
        first = model(torch.full((2, 3, 4), 5.0), 1000.0)
        later = model(torch.full((2, 3, 4), 6.0), 999.0)
    assert (float(first.mean()), float(later.mean())) == (5 + 4 + 200, 6 + 4 + 200)
    assert later.shape == (2, 3, 4)
    assert cached.report().hits.tolist() == [[0, 1]] * 4


class InPlace(Part):
    def forward(self, hidden: torch.Tensor, time: float) -> torch.Tensor:
        return hidden.add_(time)


def test_a_block_that_works_in_place_is_refused() -> None:
    model = Turned()
    model.over_space = nn.ModuleList(InPlace() for _ in range(2))
    apply_cache(model, ALWAYS)
    with torch.no_grad(), pytest.raises(InputError, match="changes its input in place"):
        model(torch.full((2, 3, 4), 5.0), 1000.0)


class Mapped(Part):
    def forward(self, hidden: torch.Tensor, time: float) -> dict[str, torch.Tensor]:
        return {"hidden": hidden + time}


def test_a_block_that_returns_something_else_is_refused_with_a_way_out() -> None:
    model = Turned()
    model.over_space = nn.ModuleList(Mapped() for _ in range(2))
    apply_cache(model, ALWAYS)
    with torch.no_grad(), pytest.raises(InputError, match=r"got dict.*easycache"):
        model(torch.full((2, 3, 4), 5.0), 1000.0)


def test_a_model_without_blocks_can_only_be_skipped_whole() -> None:
    model = nn.Sequential()
    model.forward = lambda latent, timestep: latent + 1
    with pytest.raises(InputError, match="needs at least 1 blocks"):
        apply_cache(model, ALWAYS)
    apply_cache(model, CacheSection(policy="easycache", num_steps=9))


def test_a_timestep_of_another_name_is_named() -> None:
    model = nn.Sequential()
    model.forward = lambda latent, when: latent + 1
    section = CacheSection(policy="easycache", num_steps=9)
    with pytest.raises(InputError, match="it takes latent, when; name the argument"):
        apply_cache(model, section)
    apply_cache(model, section, timestep="when")


def test_blocks_that_a_person_names_must_exist() -> None:
    section = CacheSection(policy="fixed", num_steps=9, blocks=("over_space.7",))
    with pytest.raises(InputError, match=r"no module 'over_space\.7'; did you mean"):
        apply_cache(Turned(), section)
