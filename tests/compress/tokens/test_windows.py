"""Merging inside windows of a raster: by hand where possible."""

from __future__ import annotations

import pytest
import torch

from vcompress.compress.tokens.windows import Box, GridWindows


def merged(windows: GridWindows, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Tokens `[R, N, C]` merged and put back, in raster order."""
    arranged = windows.arrange(tokens)
    reduction = windows.match(arranged, share, "euclidean")
    return windows.rearrange(reduction.restore(reduction.apply(arranged)[0]))


def test_the_nearest_join_the_receiver_of_their_cell() -> None:
    # A window of 2 x 2 with its receiver in the corner; half of four stay, so two join it: 1 and
    # 0.2. Their mean with 0 is 0.4; 10 stays alone.
    windows = GridWindows((1, 2, 2), (1, 2, 2), (1, 2, 2))
    tokens = torch.tensor([[[0.0], [1.0], [10.0], [0.2]]])
    arranged = windows.arrange(tokens)
    assert arranged.flatten().tolist() == pytest.approx([1, 10, 0.2, 0])
    kept, sizes = windows.match(arranged, 0.5, "euclidean").apply(arranged)
    assert kept.flatten().tolist() == pytest.approx([10, 0.4])
    assert sizes.tolist() == [[1, 3]]
    assert merged(windows, tokens, 0.5).flatten().tolist() == pytest.approx([0.4, 0.4, 10, 0.4])


def test_distance_and_direction_choose_differently() -> None:
    # The receivers are (1, 0) and (0, 1), in the corners of their cells. (5, 1) points like the
    # first and (0.4, 0.6) is near the second; one of the two joins.
    windows = GridWindows((1, 1, 4), (1, 1, 4), (1, 1, 2))
    tokens = torch.tensor([[[1.0, 0.0], [5.0, 1.0], [0.0, 1.0], [0.4, 0.6]]])
    arranged = windows.arrange(tokens)
    joined = {
        distance: arranged[0, windows.match(arranged, 0.75, distance).parts[0].source[0, 0]]
        for distance in ("euclidean", "cosine")
    }
    assert joined["euclidean"].tolist() == pytest.approx([0.4, 0.6])
    assert joined["cosine"].tolist() == [5, 1]


@pytest.mark.parametrize(
    ("grid", "window", "cell"),
    [
        ((2, 4, 4), (2, 4, 4), (1, 2, 2)),
        ((3, 6, 5), (2, 4, 4), (1, 2, 2)),
        ((5, 7, 3), (2, 3, 8), (2, 2, 2)),
        ((1, 1, 1), (2, 4, 4), (1, 2, 2)),
        ((4, 5, 5), (2, 5, 5), (2, 3, 3)),
    ],
)
def test_windows_cover_any_raster_once(grid: Box, window: Box, cell: Box) -> None:
    windows = GridWindows(grid, window, cell)
    count = grid[0] * grid[1] * grid[2]
    assert sorted(windows.order.tolist()) == list(range(count))
    tokens = torch.randn(2, count, 3)
    assert torch.equal(windows.rearrange(windows.arrange(tokens)), tokens)
    start = 0
    for group in windows.groups:
        for _ in range(group.num_windows):
            places = windows.order[start : start + group.size]
            start += group.size
            axes = torch.stack(torch.unravel_index(places, grid))
            extent = axes.amax(1) - axes.amin(1) + 1
            assert (extent <= torch.tensor(window)).all()
            assert int(extent.prod()) == group.size
    for share in (0.3, 0.7, 1.0):
        arranged = windows.arrange(tokens)
        kept, sizes = windows.match(arranged, share, "euclidean").apply(arranged)
        assert kept.shape == (2, windows.num_kept(share), 3)
        assert sizes.sum(1).tolist() == [count, count]
        # What is conserved with the sizes is the sum of all tokens.
        total = (kept * sizes[..., None]).sum(1)
        assert torch.allclose(total, tokens.sum(1), atol=1e-4)
    assert windows.num_kept(1.0) == count


def test_shares_are_rounded_in_every_window() -> None:
    # 3 frames by windows of 2 are windows of 1 and of 2 frames: 16 and 32 tokens, of which 0.7 are
    # 11.2 and 22.4.
    windows = GridWindows((3, 4, 4), (2, 4, 4), (1, 2, 2))
    assert [group.size for group in windows.groups] == [16, 32]
    assert windows.num_kept(0.7) == 11 + 22
    # All receivers stay, whatever is asked for: one of four.
    assert windows.num_kept(0.1) == 12


def test_tokens_that_are_alike_in_their_windows_merge_without_loss() -> None:
    windows = GridWindows((4, 8, 8), (2, 4, 4), (1, 2, 2))
    coarse = torch.randn(3, 2, 2, 2, 5)
    tokens = coarse
    for axis, width in enumerate((2, 4, 4)):
        tokens = tokens.repeat_interleave(width, axis + 1)
    tokens = tokens.reshape(3, -1, 5)
    assert torch.allclose(merged(windows, tokens, 0.25), tokens, atol=1e-6)
    # Windows elsewhere would average over borders.
    other = GridWindows((4, 8, 8), (4, 3, 3), (4, 3, 3))
    assert not torch.allclose(merged(other, tokens, 0.25), tokens, atol=1e-2)


def test_matching_is_local() -> None:
    # A token far away that is equal to the one that has to go does not take it.
    windows = GridWindows((1, 1, 4), (1, 1, 2), (1, 1, 2))
    tokens = torch.tensor([[[0.0], [9.0], [9.0], [0.0]]])
    assert merged(windows, tokens, 0.5).flatten().tolist() == [4.5, 4.5, 4.5, 4.5]


def test_index_tensors_are_no_part_of_the_state() -> None:
    windows = GridWindows((1, 2, 2), (1, 2, 2), (1, 2, 2))
    assert not windows.state_dict()
    assert windows.half().order.dtype == torch.int64
