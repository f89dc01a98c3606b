"""The reference video diffusion transformer: its data, its training and diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vcompress.models.reference import bouncing_garments as garments
from vcompress.models.reference import judge_diffusion, moving_fashion
from vcompress.models.reference.bouncing_garments import Prompt
from vcompress.models.reference.diffusion_sampler import (
    build_pipeline,
    continue_clips,
    generate,
    to_frames,
    to_latents,
)
from vcompress.models.reference.train_diffusion import Trainer, export, new_model
from vcompress.spec.errors import InputError

TINY = {
    "patch_size": [4, 8, 8], "num_attention_heads": 2, "attention_head_dim": 12,
    "in_channels": 1, "out_channels": 1, "text_dim": garments.TOKEN_WIDTH, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return garments.draw(moving_fashion.split("test"), count, generator)


def test_the_same_seed_draws_the_same_clips() -> None:
    clips, labels, corners = drawn(8)
    again = drawn(8)
    assert clips.shape == (8, 16, 48, 48)
    assert clips.dtype == torch.uint8
    assert all(torch.equal(*pair) for pair in zip((clips, labels, corners), again, strict=True))
    assert not torch.equal(clips, drawn(8, seed=1)[0])


def test_a_garment_moves_as_its_label_says_and_stays_inside() -> None:
    clips, labels, corners = drawn(64)
    assert ((corners >= 0) & (corners <= 20)).all()
    steps = corners.diff(dim=1)
    # Before the first bounce a garment moves where the label says; then along the same axes.
    pointed = torch.tensor([[0, 1], [1, 1], [1, 0], [1, -1], [0, -1], [-1, -1], [-1, 0], [-1, 1]])
    velocity = pointed[labels[:, 1]] * (labels[:, 2:] + 1)
    assert (steps[:, :3] == velocity[:, None]).all()
    assert (steps.abs() <= velocity[:, None].abs()).all()
    assert bool((steps != velocity[:, None]).any())
    error, still = judge_diffusion.motion_error(clips[:8].numpy(), labels[:8])
    assert error < 1e-6
    assert still > 2
    turned = labels[:8].clone()
    turned[:, 1] = (turned[:, 1] + 4) % 8
    assert judge_diffusion.motion_error(clips[:8].numpy(), turned)[0] > 0.5


def test_a_clip_shows_its_garment() -> None:
    generator = torch.Generator().manual_seed(2)
    source = moving_fashion.split("test")
    one = moving_fashion.Garments(images=source.images[:1], kinds=source.kinds[:1])
    clips, labels, corners = garments.draw(one, 3, generator)
    for clip, corner in zip(clips, corners, strict=True):
        y, x = corner[9].tolist()
        assert np.array_equal(clip[9, y : y + 28, x : x + 28].numpy(), source.images[0])
    assert (labels[:, 0] == int(source.kinds[0])).all()
    assert int((clips > 0).sum()) == 3 * 16 * int((source.images[0] > 0).sum())


def test_prompts_are_read_and_mistakes_named() -> None:
    prompt = Prompt.parse("ankle boot, NE, fast")
    assert prompt.label == (9, 7, 1)
    assert Prompt.parse(prompt.text) == prompt
    with pytest.raises(InputError, match="sneaker"):
        Prompt.parse("sneakers, NE, fast")
    with pytest.raises(InputError, match="three parts"):
        Prompt.parse("bag, S")
    tokens = garments.embed(torch.tensor([prompt.label, prompt.label]), torch.tensor([False, True]))
    assert tokens.argmax(-1).tolist() == [[9, 17, 19], [20, 20, 20]]
    prompts = judge_diffusion.held_out_prompts(160)
    assert len(set(prompts)) == 160


def test_latents_are_frames() -> None:
    clips = drawn(2)[0]
    assert np.array_equal(to_frames(to_latents(clips)), clips.numpy())


def test_clips_depend_on_their_own_seed_alone_and_continuation_keeps_what_is_known() -> None:
    model = new_model(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    pipe = build_pipeline(model)
    prompts = ["sneaker, NE, fast", "bag, S, slow"]
    both = generate(pipe, prompts, seed=4, num_steps=2)
    assert both.shape == (2, 16, 48, 48)
    alone = generate(pipe, prompts[1:], seed=5, num_steps=2)
    assert np.abs(both[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(both[0], both[1])
    known = drawn(2)[0].numpy()[:, :4]
    continued = continue_clips(pipe, known, seed=4, num_steps=2)
    assert np.array_equal(continued[:, :4], known)
    assert continued[:, 4:].std() > 0
    with pytest.raises(InputError, match="multiple of 4"):
        continue_clips(pipe, known[:, :3], seed=4)


def test_training_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    source = moving_fashion.split("calibration")
    whole = Trainer(source, TINY, batch_size=2)
    whole.run(5)
    first = Trainer(source, TINY, batch_size=2)
    first.run(3, tmp_path / "a.ckpt")
    second = Trainer(source, TINY, batch_size=2)
    second.restore(torch.load(tmp_path / "a.ckpt", weights_only=True))
    second.run(5)
    for name in ("model", "average"):
        ours, theirs = getattr(second, name).state_dict(), getattr(whole, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(second.generator.get_state(), whole.generator.get_state())
    # The decay is counted from where it began, also when it is interrupted.
    second.run(0, decay_steps=2)
    assert (second.step, second.decay_from) == (7, 5)
    export(second, tmp_path)
    assert (tmp_path / "bouncing_garments.safetensors").stat().st_size > 1000
