"""The picture of merged patches: the paint by hand, the file by its size."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from vcompress.spec.errors import InputError, MissingCapabilityError
from vcompress.validate.token_paint import Paint, colour_groups, outline
from vcompress.validate.token_picture import TokenMap, draw_token_picture


def size_of(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def random_map(frames: int, grid: tuple[int, int], tokens: int) -> TokenMap:
    origin = np.random.default_rng(0).integers(-1, tokens, (frames, *grid))
    return TokenMap(label=f"before layer.1\n{tokens} tokens", origin=origin)


def test_outlines_follow_the_groups_and_not_the_patches() -> None:
    # A group of three around a corner, one of two, one alone:
    groups = np.array([[7, 7, 2],
                       [7, 5, 2]])  # fmt: skip
    drawn = [
        "".join("#" if pixel else "." for pixel in row) for row in outline(groups, (4, 4), width=1)
    ]
    assert drawn == [
        "############",
        "#......##..#",
        "#......##..#",
        "#..######..#",
        "#..######..#",
        "#..##..##..#",
        "#..##..##..#",
        "############",
    ]


def test_an_outline_is_as_wide_as_asked() -> None:
    one_group = outline(np.zeros((2, 3), np.int64), (6, 5), width=2)
    assert one_group.shape == (12, 15)
    assert not one_group[2:-2, 2:-2].any()
    assert one_group.sum() == 12 * 15 - 8 * 11


def test_groups_that_touch_differ_in_colour_and_single_patches_have_none() -> None:
    # 1 and 2 touch at a corner, 3 and 1 are behind each other in time, 4 stands for itself.
    origin = np.array([[[1, 1, 0], [0, 0, 2]],
                       [[3, 0, 0], [3, 4, 2]]])  # fmt: skip
    colours = colour_groups(origin)
    assert set(colours) == {0, 1, 2, 3}
    assert len(set(colours.values())) == 4


def test_far_groups_share_a_colour_only_when_colours_run_out() -> None:
    origin = np.arange(40).repeat(2).reshape(1, 1, 80)
    colours = colour_groups(origin)
    assert all(colours[group] != colours[group + 1] for group in range(39))
    usage = np.bincount(list(colours.values()))
    assert usage.max() - usage.min() <= 1


def test_a_group_is_painted_with_its_mean_over_all_frames() -> None:
    frames = np.zeros((2, 16, 32, 1), np.uint8)
    frames[0, :, :16], frames[1, :, :16] = 100, 200
    frames[:, :, 16:] = 60
    origin = np.array([[[0, 1]], [[0, -1]]])
    paint = Paint.of(frames, origin)
    assert paint.mean[:, 0, 0].tolist() == [[150] * 3] * 2
    assert paint.merged.tolist() == [[[True, False]], [[True, False]]]
    first, second = (
        paint.on(np.broadcast_to(frame, (16, 32, 3)).copy(), index)
        for index, frame in enumerate(frames)
    )
    for picture in (first, second):
        assert (picture[1:-1, 1:15] == 150).all()
        assert (picture[0, :16] == paint.edge[0, 0, 0]).all()
    # What is alone stays to the last pixel; what is dropped is dark, with lines.
    assert (first[:, 16:] == 60).all()
    assert set(np.unique(second[:, 16:])) == {27, 112}


@pytest.mark.parametrize(
    ("frames", "size", "grid", "channels"),
    [
        (1, (32, 32), (4, 4), 1),
        (4, (32, 32), (4, 4), 1),
        (8, (32, 32), (4, 4), 1),
        (8, (112, 112), (7, 7), 3),
        (16, (224, 224), (16, 16), 3),
        (12, (100, 60), (6, 3), 3),
        (64, (64, 64), (4, 4), 3),
        (2, (1080, 1920), (9, 16), 3),
    ],
    ids=str,
)
def test_the_picture_has_a_sensible_size(
    tmp_path: Path, frames: int, size: tuple[int, int], grid: tuple[int, int], channels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, *size, channels), np.uint8)
    draw_token_picture(
        pixels, [random_map(frames, grid, 5), random_map(frames, grid, 3)], title="$a^b$ " * 30,
        frame_labels=[f"frame {index + 1}" for index in range(frames)],
        path=tmp_path / "tokens.png",
    )  # fmt: skip
    width, height = size_of(tmp_path / "tokens.png")
    assert 900 <= width <= 2400
    assert 300 <= height <= 2400
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.png"]


@pytest.mark.parametrize(
    ("frames", "origin", "labels", "expected"),
    [
        ((2, 8, 8, 2), (2, 2, 2), 2, "frames must be uint8"),
        ((2, 8, 8, 3), (3, 2, 2), 2, "maps must be alike"),
        ((2, 8, 8, 3), (2, 2), 2, "maps must be alike"),
        ((2, 8, 8, 3), (2, 2, 2), 1, "2 frames need as many labels"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, frames: tuple[int, ...], origin: tuple[int, ...], labels: int, expected: str
) -> None:
    token_map = TokenMap(label="", origin=np.zeros(origin, np.int64))
    with pytest.raises(InputError, match=expected):
        draw_token_picture(
            np.zeros(frames, np.uint8), [token_map], title="", frame_labels=[""] * labels,
            path=tmp_path / "tokens.png",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingCapabilityError, match=r"pip install 'vcompress-ai\[plots\]'"):
        draw_token_picture(
            np.zeros((1, 8, 8, 1), np.uint8), [random_map(1, (2, 2), 2)], title="",
            frame_labels=["frame 1"], path=tmp_path / "tokens.png",
        )  # fmt: skip
