"""Small models with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vcompress.models import load
from vcompress.models.load import LoadOptions
from vcompress.models.video import VideoModel


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], VideoModel]:
    """A VideoMAE or a ViViT of three blocks and 32 patches (2 x 4 x 4)."""

    def build(family: str) -> VideoModel:
        torch.manual_seed(0)
        adapter = next(adapter for adapter in load.ADAPTERS if adapter.family == family)
        config = {
            "image_size": 32, "patch_size": 8, "num_channels": 3, "num_frames": 4,
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 64, "num_labels": 5,
            "tubelet_size": 2 if family == "videomae" else [2, 8, 8],
        }  # fmt: skip
        state = adapter.build(config).state_dict()
        checkpoint = load.checkpoints.Checkpoint(family=family, config=config, state_dict=state)
        return load.from_checkpoint(checkpoint, name=family, source=family, options=LoadOptions())

    return build
