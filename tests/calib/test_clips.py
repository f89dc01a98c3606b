"""The set of clips: what it holds, gives out and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from vcompress.calib.clips import Clips
from vcompress.calib.preprocess import to_model_input
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

SPEC = ClipSpec(num_frames=2, height=4, width=5, channels=3)


def make_frames(count: int = 7, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.RandomState(seed).randint(0, 256, (count, 2, 4, 5, 3), np.uint8)


def make_clips(count: int = 7, **fields: Any) -> Clips:
    return Clips.from_frames(make_frames(count), SPEC, **fields)


def test_frames_stay_uint8_and_come_out_as_model_inputs() -> None:
    clips = make_clips(labels=[0, 1, 2, 3, 4, 5, 6])
    assert clips.data.dtype == np.uint8
    assert len(clips) == 7
    assert clips.labels == (0, 1, 2, 3, 4, 5, 6)
    assert clips.names[6] == "clip[6]"
    assert clips.skipped == ()
    assert np.array_equal(clips[3], to_model_input(make_frames()[3], SPEC))
    assert clips[-1].shape == SPEC.input_shape == (2, 3, 4, 5)
    assert len(list(clips)) == 7


def test_batches() -> None:
    clips = make_clips()
    batches = list(clips.batches(3))
    assert [batch.shape for batch in batches] == [(3, 2, 3, 4, 5), (3, 2, 3, 4, 5), (1, 2, 3, 4, 5)]
    assert np.array_equal(np.concatenate(batches), np.stack(list(clips)))
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        clips.batches(0)


def test_ready_inputs_are_not_processed_again() -> None:
    data = np.random.RandomState(0).standard_normal((3, 2, 3, 4, 5)).astype(np.float32)
    clips = Clips.from_array(data, SPEC)
    assert np.array_equal(clips[1], data[1])
    clips[1][:] = 0  # a copy: the clips do not change
    assert clips[1].any()


def test_ready_uint8_inputs() -> None:
    spec = ClipSpec(num_frames=2, height=4, width=5, dtype="uint8", rescale=1.0)
    ready = make_frames().transpose(0, 1, 4, 2, 3)
    from_ready, from_frames = Clips.from_array(ready, spec), Clips.from_frames(make_frames(), spec)
    assert np.array_equal(from_ready[2], from_frames[2])
    assert from_ready[2].dtype == np.uint8


def test_the_digest_is_known_and_stable() -> None:
    frames = np.zeros((1, 1, 1, 1, 1), np.uint8)
    spec = ClipSpec(num_frames=1, height=1, width=1, channels=1)
    digest = Clips.from_frames(frames, spec, names=["a"]).digest
    # sha256 of '{"dtype": "uint8", "shape": [1, 1, 1, 1, 1], "names": ["a"]}' and a zero byte
    assert digest == "ffecd42978d6763a5bd1d2b9adc1169319880d1fe656186e57a259b8fb6765fc"
    assert make_clips().digest == make_clips().digest


def test_the_digest_sees_every_change() -> None:
    original = make_clips()
    changed = make_frames()
    changed[6, 1, 3, 4, 2] ^= 1
    others = [
        Clips.from_frames(changed, SPEC),
        make_clips(names=[*original.names[:-1], "other"]),
        original.subset([1, 0, 2, 3, 4, 5, 6]),
        original.subset([0, 1, 2, 3, 4, 5]),
        Clips.from_frames(make_frames(), SPEC, names=["a,b", *original.names[1:]]),
    ]
    digests = {original.digest, *(other.digest for other in others)}
    assert len(digests) == 1 + len(others)


def test_the_digest_does_not_depend_on_memory_layout_or_labels() -> None:
    backwards = np.asfortranarray(make_frames())
    assert Clips.from_frames(backwards, SPEC).digest == make_clips().digest
    assert make_clips(labels=[1] * 7).digest == make_clips().digest


def test_subset_slice_and_sample() -> None:
    clips = make_clips(labels=list(range(7)))
    part = clips.subset([5, 2])
    assert part.names == ("clip[5]", "clip[2]")
    assert part.labels == (5, 2)
    assert np.array_equal(part[0], clips[5])
    assert clips[1:3].labels == (1, 2)
    drawn = clips.sample(3, seed=4)
    assert drawn.labels == clips.sample(3, seed=4).labels
    assert len(set(drawn.labels or ())) == 3
    assert {clips.sample(3, seed).labels for seed in range(8)} != {drawn.labels}
    with pytest.raises(InputError, match="at least one clip"):
        clips.subset([])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_parts_of_a_split_are_disjoint_and_reproducible(share: float) -> None:
    clips = make_clips(50, labels=list(range(50)))
    first, second = clips.split(share, seed=1)
    assert len(first) == round(50 * share)
    assert first.labels is not None
    assert second.labels is not None
    assert sorted(first.labels + second.labels) == list(range(50))
    assert list(first.labels) == sorted(first.labels)
    again, _ = clips.split(share, seed=1)
    other, _ = clips.split(share, seed=2)
    assert again.digest == first.digest
    assert other.digest != first.digest


@pytest.mark.parametrize(
    ("count", "share"), [(1, 0.5), (7, 0.99), (7, 0.0), (7, 1.0), (7, float("nan"))]
)
def test_a_split_with_an_empty_part_is_refused(count: int, share: float) -> None:
    with pytest.raises(InputError, match="both parts of a split must hold a clip"):
        make_clips(count).split(share, seed=0)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (make_frames()[:, :1], r"uint8 of shape \[7, 1, 4, 5, 3\]"),
        (make_frames().astype(np.float64), r"float64 of shape \[7, 2, 4, 5, 3\]"),
        (make_frames().astype(np.float32), r"float32 of shape \[7, 2, 4, 5, 3\]"),
        (make_frames().transpose(0, 1, 4, 2, 3), r"uint8 of shape \[7, 2, 3, 4, 5\]"),
        (make_frames()[0], r"uint8 of shape \[2, 4, 5, 3\]"),
        (np.array(3), r"int64 of shape \[\]"),
        (np.zeros((0, 2, 4, 5, 3), np.uint8), "got none"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(data: npt.NDArray[Any], got: str) -> None:
    with pytest.raises(InputError, match=got) as caught:
        Clips.from_array(data, SPEC)
    if "none" not in got:
        assert "uint8 frames [N, 2, 4, 5, 3]" in str(caught.value)
        assert "float32 inputs [N, 2, 3, 4, 5]" in str(caught.value)


def test_from_frames_takes_frames_alone() -> None:
    with pytest.raises(InputError, match=r"\[N, 2, 4, 5, 3\], got float32 of shape"):
        Clips.from_frames(np.zeros((1, 2, 3, 4, 5), np.float32), SPEC)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_clips_must_be_finite(value: float) -> None:
    data = np.zeros((3, 2, 3, 4, 5), np.float32)
    data[1, 0, 2, 3, 1] = value
    with pytest.raises(InputError, match="clip 1 holds NaN or infinity"):
        Clips(spec=SPEC, data=data, names=("a", "b", "c"))
    with pytest.raises(InputError, match="clip 0 holds NaN or infinity"):
        Clips.from_array(data[1:2], SPEC)
    clips = Clips.from_array(data, SPEC, names=["a", "b", "c"], labels=[3, 4, 5])
    assert (clips.names, clips.labels) == (("a", "c"), (3, 5))
    assert clips.skipped == (("b", "holds NaN or infinity"),)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"labels": [0, 1]}, "labels: one is needed for each of 7 clips, got 2"),
        ({"names": ["a"]}, "names: one is needed for each of 7 clips, got 1"),
        ({"labels": [0, 1, 2, 3, 4, 5, -1]}, "labels must be at least 0, got -1 for clip 6"),
        ({"labels": [0.5] * 7}, "labels must be integers"),
        ({"labels": np.zeros((7, 1), np.int64)}, r"got int64 of shape \[7, 1\]"),
    ],
)
def test_labels_and_names_must_fit(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_clips(**fields)
