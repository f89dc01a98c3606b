"""Clips as a recogniser sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vcompress.calib.sources import open_clips
from vcompress.models.load import load_model
from vcompress.pipeline.features import FeatureReader
from vcompress.spec.errors import InputError


@pytest.fixture(scope="module")
def reader() -> FeatureReader:
    return FeatureReader("reference:penvideo20")


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    model = load_model("reference:penvideo20")
    found = open_clips(
        "reference:penvideo20", model.clip, part="test", limit=4, seed=0, labels=model.labels
    )
    return found.data.astype(np.float32) / 255


def test_features_are_what_the_classifier_reads(reader: FeatureReader, clips: np.ndarray) -> None:
    model = load_model("reference:penvideo20")
    features = reader(clips[0])
    classifier = model.layer("classifier")
    with torch.inference_mode():
        scores = classifier(torch.from_numpy(features))
    from vcompress.calib.preprocess import to_model_input

    frames = np.rint(clips[0] * 255).astype(np.uint8)
    expected = model(torch.from_numpy(to_model_input(frames, model.clip))[None])[0]
    torch.testing.assert_close(scores, expected)


def test_noise_is_nearer_than_another_clip(reader: FeatureReader, clips: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    assert reader.distance(clips[0], clips[0]) == pytest.approx(0.0, abs=1e-9)
    noisy = np.clip(clips[0] + 0.02 * rng.standard_normal(clips[0].shape), 0, 1)
    near = reader.distance(clips[0], noisy.astype(np.float32))
    others = [reader.distance(clips[0], other) for other in clips[1:]]
    assert 0 < near < min(others)


def test_clips_of_other_sizes_and_colours_are_brought_to_its_input(
    reader: FeatureReader, clips: np.ndarray
) -> None:
    larger = clips[0].repeat(2, axis=1).repeat(2, axis=2)
    coloured = np.repeat(larger, 3, axis=-1)
    longer = np.concatenate([coloured[:1]] * 4 + [coloured] + [coloured[-1:]] * 4)
    assert reader.distance(clips[0], larger) < 0.05
    assert reader.distance(larger, coloured) < 1e-3
    assert reader.distance(coloured, longer) < 1e-6
    with pytest.raises(InputError, match="read off frames"):
        reader(clips[0][..., 0])
