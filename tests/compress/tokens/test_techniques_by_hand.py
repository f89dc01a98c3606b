"""Techniques on tokens whose answer is computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vcompress.compress.tokens.pixels import pixels_change, pixels_detail
from vcompress.compress.tokens.techniques import (
    bipartite,
    centroids,
    controls,
    detail,
    energy,
    frames,
    grouped,
    places,
    saliency,
    static_frames,
    temporal_sampling,
)
from vcompress.compress.tokens.view import AttentionInputs
from vcompress.models.video import TokenGrid


def unit(*axes: int) -> torch.Tensor:
    """Unit vectors `[K, 4]` along `axes`; 4 + i is against axis i."""
    both = torch.cat([torch.eye(4), -torch.eye(4)])
    return both[list(axes)]


def test_bipartite_joins_the_most_alike() -> None:
    # A = tokens 0, 2; B = tokens 1, 3. Token 2 points where token 1 points.
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [0.0, 8.0], [1.0, 1.0]]])
    matching = bipartite.match(tokens, 1)
    assert matching.destination().tolist() == [[0, 1, 1, 2]]


def test_bipartite_finds_equal_frames_of_an_odd_number_of_places() -> None:
    # With an odd number a place is in the set A in one frame and in the set B in the next.
    frame = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    tokens = frame.repeat(1, 4, 1)
    matching = bipartite.match(tokens, 6)
    merged, sizes = matching.apply(tokens, torch.ones(2, 12))
    assert torch.allclose(matching.restore(merged), tokens, atol=1e-6)
    assert sizes.sum(1).tolist() == [12, 12]


def test_zero_keys_do_not_make_nan() -> None:
    keys = torch.zeros(1, 8, 4)
    for reducer in (bipartite.match(keys, 3), energy.match(keys, 3), frames.match(keys, 4, 1)):
        merged, _ = reducer.apply(keys, torch.ones(1, 8))
        assert torch.isfinite(merged).all()


def test_sharpness_is_negative_entropy() -> None:
    # Keys are axes, so queries are logits: probabilities (1/3, 1/3, 1/3), (1/2, 1/4, 1/4) and, for
    # the other head, once more the first, so that the second token has (5/12, 7/24, 7/24).
    key = torch.eye(3).expand(1, 2, 3, 3)
    query = torch.zeros(1, 2, 3, 3)
    query[0, 0, 1, 0] = math.log(2.0)
    attention = AttentionInputs(query=query, key=key, scale=1.0)
    even = math.log(1 / 3)
    sharp = 5 / 12 * math.log(5 / 12) + 7 / 12 * math.log(7 / 24)
    assert saliency.sharpness(attention, 0)[0].tolist() == pytest.approx([even, sharp, even])
    assert saliency.sharpness(attention, 1)[0].tolist() == pytest.approx([sharp, even])


def test_background_is_what_is_below_the_mean() -> None:
    # Means 5 and -1; the largest are 4 and 1 above them.
    sharp = torch.tensor([[0.0, 5.0, 6.0, 9.0], [-3.0, -1.0, 0.0, 0.0]])
    assert saliency.saliency(sharp).tolist() == [[0.0, 0.0, 0.25, 1.0], [0.0, 0.0, 1.0, 1.0]]
    # Without a difference there is no background.
    assert saliency.saliency(torch.full((1, 3), -2.0)).tolist() == [[1.0, 1.0, 1.0]]


def test_saliency_weighs_what_joins() -> None:
    # As above, token 2 joins token 1, here with half of its 3 patches: (4 + 1.5 * 8) / 2.5 = 6.4.
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [0.0, 8.0], [1.0, 1.0]]])
    sizes = torch.tensor([[1.0, 1.0, 3.0, 1.0]])
    half = saliency.match(tokens, torch.tensor([[1.0, 0.0, 0.5, 1.0]]), 1)
    merged, grown = half.apply(tokens, sizes)
    assert merged[0, 1].tolist() == pytest.approx([0.0, 6.4])
    assert grown.tolist() == [[1.0, 2.5, 1.0]]
    background = saliency.match(tokens, torch.zeros(1, 4), 1)
    merged, grown = background.apply(tokens, sizes)
    assert merged.tolist() == tokens[:, [0, 1, 3]].tolist()
    assert grown.tolist() == [[1.0, 1.0, 1.0]]


def test_energy_protects_what_is_rare() -> None:
    # Three along one axis and one across. With margin 1/2 each of the three has 3 ELU(1/2) and
    # ELU(-1/2) = exp(-1/2) - 1; the last has it the other way round.
    keys = unit(0, 0, 1, 0)[None]
    low = math.exp(-0.5) - 1
    common, rare = (1.5 + low) / 4, (0.5 + 3 * low) / 4
    assert energy.energy(keys, 0.5)[0].tolist() == pytest.approx([common, common, rare, common])
    # The mean of ten ones and six zeros is 10/16.
    low, high = math.exp(-0.625) - 1, 0.375
    assert energy.energy(keys)[0].tolist()[2] == pytest.approx((high + 3 * low) / 4)
    matching = energy.match(keys, 1)
    assert 2 in matching.kept[0].tolist()
    assert 2 not in matching.kept[0, -matching.num_receivers :].tolist()
    merged, sizes = matching.apply(keys, torch.ones(1, 4))
    assert sorted(sizes[0].tolist()) == [1.0, 1.0, 2.0]
    assert torch.equal(matching.restore(merged), keys)


def test_runs_end_where_pixels_change() -> None:
    # 3 frames of 2 places. The largest changes are place 1 in the last frame and place 0 in the
    # middle one; the first frame stays although nothing is known of it.
    change = torch.tensor([[0.0, 0.0, 0.5, 0.1, 0.2, 0.9]])
    reduction = static_frames.reduce(change, num_frames=3, keep=4)
    assert reduction.kept.tolist() == [[0, 2, 1, 5]]
    assert reduction.destination().tolist() == [[0, 2, 1, 2, 1, 3]]
    tokens = torch.arange(6.0).view(1, 6, 1)
    merged, sizes = reduction.apply(tokens, torch.ones(1, 6))
    assert merged[0, :, 0].tolist() == [0.0, 2.0, 1.0, 5.0]
    assert sizes.tolist() == [[1.0, 2.0, 2.0, 1.0]]


def test_a_still_clip_keeps_the_same_tokens_everywhere() -> None:
    reduction = static_frames.reduce(torch.zeros(1, 24), num_frames=4, keep=9)
    # Six of the first frame and the first three of the second.
    assert sorted(reduction.kept[0].tolist()) == list(range(9))


@pytest.mark.parametrize("layout", ["NTCHW", "NCTHW", "NTHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pixels_are_compared_a_tubelet_earlier(layout: str, dtype: torch.dtype) -> None:
    # Two tubelets of two frames, 2 x 2 patches of 2 x 2 pixels, 3 channels; one row of pixels is
    # left over. One value of the last patch falls by 240, of 2 * 3 * 4; the other frame of the
    # first tubelet has the same in its last patch as that of the second.
    clips = torch.zeros(1, 4, 3, 5, 4)
    clips[0, 0, 1, 3, 2] = 250
    clips[0, 2, 1, 3, 2] = 10
    clips[0, 1, 0, 0, 0] = clips[0, 3, 0, 0, 0] = 77
    clips[0, 1, 2, 4] = 200
    order = {"NTCHW": (0, 1, 2, 3, 4), "NCTHW": (0, 2, 1, 3, 4), "NTHWC": (0, 1, 3, 4, 2)}
    grid = TokenGrid(frames=2, height=2, width=2)
    change = pixels_change(clips.to(dtype).permute(order[layout]), layout, grid)
    assert change.tolist() == [[0, 0, 0, 0, 0, 0, 0, 10]]


@pytest.mark.parametrize("layout", ["NTCHW", "NTHWC"])
def test_detail_is_the_deviation_inside_a_token(layout: str) -> None:
    # One tubelet of two frames, 1 x 2 patches of 2 x 2 pixels, 2 channels. A colour is no detail,
    # in the first patch; one of eight values of one channel is 8 above the others in the second:
    # its variance is 64 / 8 * 7 / 8 = 7.
    clips = torch.zeros(1, 2, 2, 2, 4)
    clips[:, :, 0, :, :2] = 3.0
    clips[:, :, 1] = -5.0
    clips[0, 1, 1, 0, 3] += 8
    order = {"NTCHW": (0, 1, 2, 3, 4), "NTHWC": (0, 1, 3, 4, 2)}
    grid = TokenGrid(frames=1, height=1, width=2)
    found = pixels_detail(clips.permute(order[layout]), layout, grid)
    assert found[0].tolist() == pytest.approx([0.0, math.sqrt(7) / 2])


def test_flat_tokens_join_flat_ones() -> None:
    # Six are kept: four with most detail, and two of the flat ones 0, 2, 3, 5, 6, 8, which stand
    # at the second and the fifth of them. The others join the one they are like.
    strength = torch.tensor([[0.0, 9.0, 0.0, 1e-7, 4.0, 0.0, 0.0, 5.0, 0.0, 6.0]])
    keys = torch.zeros(1, 10, 2)
    keys[0, [0, 2, 8]] = torch.tensor([1.0, 0.0])
    keys[0, [3, 5, 6]] = torch.tensor([0.0, 1.0])
    reduction = detail.reduce(strength, keys, keep=6)
    assert detail.num_flat(6) == 2
    assert reduction.kept.tolist() == [[1, 9, 7, 4, 2, 6]]
    assert reduction.destination().tolist() == [[4, 0, 4, 5, 3, 5, 5, 2, 4, 1]]
    tokens = torch.arange(10.0).view(1, 10, 1)
    merged, sizes = reduction.apply(tokens, torch.ones(1, 10))
    assert merged[0, :, 0].tolist() == pytest.approx([1, 9, 7, 4, 10 / 3, 14 / 3])
    assert sizes.tolist() == [[1, 1, 1, 1, 3, 3]]


def test_whole_places_are_dropped() -> None:
    # As in the test of places: 2 leaves, in both frames, and nothing of it is left.
    first = torch.stack([*unit(0, 0, 1), torch.tensor([0.0, 0.6, 0.8, 0.0])])
    second = torch.stack([*unit(0, 1, 2), torch.tensor([0.0, 0.0, 0.8, 0.6])])
    dropping = controls.drop_places(torch.stack([first, second]), num_frames=2, merges=1)
    assert dropping.destination().tolist() == [[0, 1, -1, 2], [0, 1, -1, 2]]


def test_places_are_alike_in_all_frames_or_not_at_all() -> None:
    # Places 0 and 1 are equal in the first frame and across in the second: 1/2 on average. Places 2
    # and 3 have cosines 0.6 and 0.8, so they merge, in both frames. A = 0, 2; B = 1, 3.
    first = torch.stack([*unit(0, 0, 1), torch.tensor([0.0, 0.6, 0.8, 0.0])])
    second = torch.stack([*unit(0, 1, 2), torch.tensor([0.0, 0.0, 0.8, 0.6])])
    matching = places.match(torch.stack([first, 5 * second]), num_frames=2, merges=1)
    assert matching.destination().tolist() == [[0, 1, 2, 2], [0, 1, 2, 2]]
    # Another sequence beside it changes nothing.
    keys = torch.stack([first, 5 * second, second, first])
    assert torch.equal(
        places.match(keys, 2, 1).destination()[:2], matching.destination()
    )  # fmt: skip


def test_frames_merge_by_majority() -> None:
    # Places 0 and 1 of frame 0 find themselves in frame 3, place 2 in frame 1: two votes to one.
    # Frame 2 is against all of them. So frame 0 joins frame 3, and time goes on.
    keys = torch.stack([unit(0, 1, 2), unit(3, 3, 2), unit(4, 5, 6), unit(0, 1, 3)])
    merging = frames.match(keys.view(1, 12, 4), num_frames=4, merges=1)
    assert merging.kept.tolist() == [[1, 2, 3]]
    assert merging.source.tolist() == [[0]]
    assert merging.target.tolist() == [[2]]
    assert merging.destination().tolist() == [[6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_of_equal_frames_the_nearest_is_taken() -> None:
    keys = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    merging = frames.match(keys.expand(1, 8, 3, 4).reshape(1, 24, 4), num_frames=8, merges=4)
    joined = merging.kept.gather(1, merging.target)
    assert ((joined - merging.source).abs() == 1).all()


def test_attention_received_is_the_mean_over_heads() -> None:
    # Keys are axes. The special token gives 1/2, 1/4, 1/4 in one head and 1/4, 1/2, 1/4 in the
    # other.
    key = torch.eye(3).expand(1, 2, 3, 3)
    query = torch.zeros(1, 2, 3, 3)
    query[0, 0, 0, 0] = query[0, 1, 0, 1] = math.log(2.0)
    attention = AttentionInputs(query=query, key=key, scale=1.0)
    received = grouped.attention_received(attention, 1)
    assert received[0].tolist() == pytest.approx([0.375, 0.25])
    # Without a special token the mean query asks: a third of the logit.
    third = 2.0 ** (1 / 3)
    most, least = third / (third + 2), 1 / (third + 2)
    received = grouped.attention_received(attention, 0)
    assert received[0].tolist() == pytest.approx([(most + least) / 2] * 2 + [least])
    # Of a token that stands for two, twice as much.
    biased = AttentionInputs(
        query=torch.zeros(1, 2, 3, 3), key=key, scale=1.0,
        bias=torch.tensor([1.0, 2.0, 1.0]).log().view(1, 1, 1, 3),
    )  # fmt: skip
    assert grouped.attention_received(biased, 1)[0].tolist() == pytest.approx([0.5, 0.25])


def test_every_frame_keeps_its_share() -> None:
    scores, keys = torch.tensor([[0.4, 0.3, 0.1, 0.2]]), unit(0, 0, 1, 1)[None]
    assert grouped.reduce(scores, keys, num_frames=2, keep=2).kept.tolist() == [[0, 3]]
    # The third goes to the best of the rest, whatever its frame.
    assert grouped.reduce(scores, keys, num_frames=2, keep=3).kept.tolist() == [[0, 3, 1]]
    assert grouped.reduce(scores, keys, num_frames=1, keep=2).kept.tolist() == [[0, 1]]
    # Those that left get the value of the kept token that is like them.
    reduction = grouped.reduce(scores, keys, num_frames=2, keep=2)
    assert reduction.restore(torch.tensor([[[1.0], [2.0]]]))[0, :, 0].tolist() == [1, 1, 2, 2]


def test_sampled_frames_stand_for_their_neighbours() -> None:
    assert temporal_sampling.sampled_times(8, 8) == list(range(8))
    assert temporal_sampling.sampled_times(8, 4) == [1, 3, 5, 7]
    assert temporal_sampling.sampled_times(8, 3) == [1, 4, 6]
    assert temporal_sampling.sampled_times(8, 1) == [4]
    tokens = torch.arange(16.0).view(1, 16, 1)
    reducer = temporal_sampling.reduce(tokens, num_frames=8, keep=3)
    kept, sizes = reducer.apply(tokens, torch.ones(1, 16))
    assert kept[0, :, 0].tolist() == [2, 3, 8, 9, 12, 13]
    # 0, 1, 2 by 1; 3, 4, 5 by 4, which is as near to 5 as 6; 6, 7 by 6.
    assert sizes.tolist() == [[3, 3, 3, 3, 2, 2]]
    assert reducer.destination()[0, ::2].tolist() == [0, 0, 0, 2, 2, 2, 4, 4]


def test_random_indices_are_constants() -> None:
    one, other = torch.randn(1, 25, 4), torch.zeros(3, 25, 2)
    first, second = controls.random(one, 10), controls.random(other, 10)
    assert torch.equal(first.destination().expand(3, -1), second.destination())
    # Every receiver gets about as many.
    _, sizes = first.apply(one, torch.ones(1, 25))
    assert sizes.max() - sizes.min() <= 1


def test_centroids_are_means_of_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    # Length is weight: three times (0.8, 0.6) against once (1, 0) is (3.4, 1.8), scaled to 1.
    keys = torch.tensor([[1.0, 0.0], [2.4, 1.8]])
    center = centroids.fit_centroids(keys, 1, generator)
    assert torch.allclose(center, torch.tensor([[3.4, 1.8]]) / math.hypot(3.4, 1.8))
    # Three bundles of five, found whatever the draw.
    axes = torch.eye(3).repeat_interleave(5, dim=0)
    noise = 0.05 * torch.randn(15, 3, generator=generator)
    for seed in range(5):
        drawn = torch.Generator().manual_seed(seed)
        fitted = centroids.fit_centroids(axes + noise, 3, drawn)
        assert torch.allclose(fitted @ torch.eye(3)[fitted.argmax(1)].T, torch.eye(3), atol=0.1)
        drawn = torch.Generator().manual_seed(seed)
        assert torch.equal(fitted, centroids.fit_centroids(axes + noise, 3, drawn))


def test_more_centroids_than_directions_are_finite() -> None:
    keys = torch.eye(2).repeat(3, 1)
    fitted = centroids.fit_centroids(keys, 4, torch.Generator().manual_seed(0))
    assert fitted.shape == (4, 2)
    assert torch.allclose(torch.linalg.vector_norm(fitted, dim=1), torch.ones(4))
    zeros = centroids.fit_centroids(torch.zeros(3, 2), 2, torch.Generator().manual_seed(0))
    assert torch.isfinite(zeros).all()


def test_sharp_centroids_merge_groups_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[0, 1, 2, 1, 0, 2, 2]])
    keys = torch.eye(3)[groups] + 0.01 * torch.randn(1, 7, 3, generator=generator)
    fitted = centroids.fit_centroids(keys[0], 3, generator)
    mixing = centroids.reduce(keys, fitted / 0.01)
    tokens = torch.randn(1, 3, 5, generator=generator)[:, groups[0]]
    merged, sizes = mixing.apply(tokens, torch.ones(1, 7))
    assert torch.allclose(mixing.restore(merged), tokens, atol=1e-5)
    assert sizes.sum().item() == pytest.approx(7)
    assert sorted(round(size, 3) for size in sizes[0].tolist()) == [2, 2, 3]
    # A temperature without end divides every token evenly.
    soft = centroids.reduce(keys, fitted / 1e6)
    assert torch.allclose(soft.shares, torch.full((1, 7, 3), 1 / 3), atol=1e-5)
