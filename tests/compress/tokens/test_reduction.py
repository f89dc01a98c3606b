"""Reducers: averages by size, sizes, destinations and the way back, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vcompress.compress.tokens.reduction import Chain, Mixing, Reducer, Reduction
from vcompress.compress.tokens.techniques.frames import WholeFrames
from vcompress.compress.tokens.techniques.places import InEveryFrame

# Token 2 joins token 1, token 3 joins token 4; token 0 is alone and cannot receive.
INDICES = {
    "kept": torch.tensor([[0, 1, 4]]), "source": torch.tensor([[2, 3]]),
    "target": torch.tensor([[0, 1]]), "num_receivers": 2,
}  # fmt: skip
TOKENS = torch.tensor([[[1.0], [4.0], [8.0], [2.0], [6.0]]])
SIZES = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0]])


def column(tokens: torch.Tensor) -> list[list[float]]:
    return tokens[..., 0].tolist()


def test_tokens_are_averaged_by_size() -> None:
    # (1 * 4 + 3 * 8) / 4 = 7 and (6 + 2) / 2 = 4.
    merged, sizes = Reduction(**INDICES).apply(TOKENS, SIZES)
    assert column(merged) == [[1.0, 7.0, 4.0]]
    assert sizes.tolist() == [[2.0, 4.0, 2.0]]
    assert Reduction(**INDICES).destination().tolist() == [[0, 1, 1, 2, 2]]


def test_restored_tokens_get_the_value_of_their_group() -> None:
    merged, _ = Reduction(**INDICES).apply(TOKENS, SIZES)
    assert column(Reduction(**INDICES).restore(merged)) == [[1.0, 7.0, 7.0, 4.0, 4.0]]


def test_shares_weigh_the_sources() -> None:
    # Half of 3 patches of 8 beside 1 of 4: (4 + 1.5 * 8) / 2.5 = 6.4; nothing of the other.
    half = torch.tensor([[0.5, 0.0]])
    merged, sizes = Reduction(**INDICES, value_share=half, size_share=half).apply(TOKENS, SIZES)
    assert column(merged)[0] == pytest.approx([1.0, 6.4, 6.0])
    assert sizes.tolist() == [[2.0, 2.5, 1.0]]


@pytest.mark.parametrize("share", [1.0, 0.5, torch.tensor([[0.25, 1.0, 0.0]])])
def test_few_sources_say_the_same_as_many(share: float | torch.Tensor) -> None:
    # Tokens 0 and 9 join token 4, token 7 joins token 2; with few receivers the whole one-hot
    # matrix is multiplied, with many only the rows that change.
    few = Reduction(
        kept=torch.tensor([[3, 1, 2, 4, 5, 6, 8, 10, 11]]), source=torch.tensor([[0, 7, 9]]),
        target=torch.tensor([[1, 0, 1]]), num_receivers=7, value_share=share, size_share=share,
    )  # fmt: skip
    many = replace(few, kept=few.kept[:, [0, 1, 4, 5, 6, 7, 8, 2, 3]], num_receivers=2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 64, generator=generator)
    sizes = 3 * torch.rand(2, 12, generator=generator) + 1
    both = [
        replace(each, kept=each.kept.expand(2, -1), source=each.source.expand(2, -1),
                target=each.target.expand(2, -1))
        for each in (few, many)
    ]  # fmt: skip
    (merged, grown), (expected, sized) = (each.apply(tokens, sizes) for each in both)
    order = [0, 1, 7, 8, 2, 3, 4, 5, 6]
    assert torch.allclose(merged, expected[:, order], atol=1e-6)
    assert torch.allclose(grown, sized[:, order])
    assert torch.equal(merged[:, 4:], tokens[:, [5, 6, 8, 10, 11]])
    assert not torch.allclose(merged[:, 3], tokens[:, 4])


def test_a_run_takes_over_sizes_only() -> None:
    reduction = Reduction(**INDICES, value_share=0.0, size_share=1.0)
    merged, sizes = reduction.apply(TOKENS, SIZES)
    assert column(merged) == [[1.0, 4.0, 6.0]]
    assert sizes.tolist() == [[2.0, 4.0, 2.0]]
    assert reduction.destination().tolist() == [[0, 1, 1, 2, 2]]


def test_dropped_tokens_are_nowhere() -> None:
    reduction = Reduction(**INDICES, value_share=0.0, size_share=0.0)
    merged, sizes = reduction.apply(TOKENS, SIZES)
    assert column(merged) == [[1.0, 4.0, 6.0]]
    assert sizes.tolist() == [[2.0, 1.0, 1.0]]
    assert reduction.destination().tolist() == [[0, 1, -1, -1, 2]]
    # A dense output still needs a value there.
    assert column(reduction.restore(merged)) == [[1.0, 4.0, 4.0, 6.0, 6.0]]


def test_tokens_that_nothing_joins_keep_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 5, 64, generator=generator)
    sizes = 3 * torch.rand(1, 5, generator=generator) + 1
    everyone = {**INDICES, "num_receivers": 3, "target": torch.tensor([[0, 0]])}
    merged, _ = Reduction(**everyone).apply(tokens, sizes)
    assert torch.equal(merged[:, 1:], tokens[:, [1, 4]])
    times = {"kept": torch.tensor([[0, 1]]), "source": torch.tensor([[2]])}
    frames = WholeFrames(**times, target=torch.tensor([[0]]), num_places=5)
    tokens = torch.randn(1, 15, 64, generator=generator)
    assert torch.equal(frames.apply(tokens, sizes.repeat(1, 3))[0][:, 5:], tokens[:, 5:10])


def test_a_chain_follows_every_token() -> None:
    # First 2 -> 1 and 3 -> 4 leave [1, 7, 4] of sizes [2, 4, 2]; then 1 joins 4: (2 + 8) / 4.
    second = Reduction(
        kept=torch.tensor([[1, 2]]), source=torch.tensor([[0]]), target=torch.tensor([[1]]),
        num_receivers=2,
    )  # fmt: skip
    chain = Chain((Reduction(**INDICES), second))
    merged, sizes = chain.apply(TOKENS, SIZES)
    assert column(merged) == [[7.0, 2.5]]
    assert sizes.tolist() == [[4.0, 4.0]]
    assert chain.destination().tolist() == [[1, 0, 0, 1, 1]]
    assert column(chain.restore(merged)) == [[2.5, 7.0, 7.0, 2.5, 2.5]]


def test_what_a_chain_dropped_stays_dropped() -> None:
    dropping = Reduction(**INDICES, value_share=0.0, size_share=0.0)
    second = Reduction(
        kept=torch.tensor([[1, 2]]), source=torch.tensor([[0]]), target=torch.tensor([[1]]),
        num_receivers=2,
    )  # fmt: skip
    assert Chain((dropping, second)).destination().tolist() == [[1, 0, -1, -1, 1]]


def test_mixing_divides_tokens() -> None:
    # Token 0 in halves, tokens 1 and 2 whole: sizes 0.5 + 1 and 0.5 + 2.
    mixing = Mixing(shares=torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]]))
    tokens = torch.tensor([[[3.0], [6.0], [9.0]]])
    mixed, sizes = mixing.apply(tokens, torch.tensor([[1.0, 1.0, 2.0]]))
    assert column(mixed)[0] == pytest.approx([(1.5 + 6) / 1.5, (1.5 + 18) / 2.5])
    assert sizes.tolist() == [[1.5, 2.5]]
    assert mixing.destination().tolist() == [[0, 0, 1]]
    assert column(mixing.restore(torch.tensor([[[2.0], [4.0]]]))) == [[3.0, 2.0, 4.0]]


def test_an_empty_mixture_is_finite() -> None:
    mixed, sizes = Mixing(shares=torch.tensor([[[1.0, 0.0]]])).apply(
        torch.ones(1, 1, 2), torch.ones(1, 1)
    )
    assert torch.isfinite(mixed).all()
    assert sizes.tolist() == [[1.0, 0.0]]


def test_every_frame_does_the_same() -> None:
    # Two frames of three places; place 2 joins place 0 in both.
    one = Reduction(
        kept=torch.tensor([[1, 0]]).expand(2, -1), source=torch.tensor([[2]]).expand(2, -1),
        target=torch.tensor([[0]]).expand(2, -1), num_receivers=1,
    )  # fmt: skip
    frames = InEveryFrame(places=one, num_frames=2, num_left=2)
    tokens = torch.tensor([[[1.0], [2.0], [3.0], [10.0], [20.0], [40.0]]])
    merged, sizes = frames.apply(tokens, torch.tensor([[1.0, 1.0, 1.0, 2.0, 1.0, 1.0]]))
    assert column(merged) == [[2.0, 2.0, 20.0, 20.0]]
    assert sizes.tolist() == [[1.0, 2.0, 1.0, 3.0]]
    assert frames.destination().tolist() == [[1, 0, 1, 3, 2, 3]]
    assert column(frames.restore(merged)) == [[2.0, 2.0, 2.0, 20.0, 20.0, 20.0]]


def test_whole_frames_average_place_by_place() -> None:
    # Three frames of two places; the last joins the first, its first place with size 3.
    frames = WholeFrames(
        kept=torch.tensor([[0, 1]]), source=torch.tensor([[2]]), target=torch.tensor([[0]]),
        num_places=2,
    )  # fmt: skip
    tokens = torch.tensor([[[1.0], [2.0], [5.0], [6.0], [9.0], [4.0]]])
    merged, sizes = frames.apply(tokens, torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 1.0]]))
    assert column(merged) == [[7.0, 3.0, 5.0, 6.0]]
    assert sizes.tolist() == [[4.0, 2.0, 1.0, 1.0]]
    assert frames.destination().tolist() == [[0, 1, 2, 3, 0, 1]]
    assert column(frames.restore(merged)) == [[7.0, 3.0, 5.0, 6.0, 7.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_keep_their_type_and_sizes_theirs(dtype: torch.dtype) -> None:
    reducers: list[Reducer] = [
        Reduction(**INDICES),
        Mixing(shares=torch.full((1, 5, 2), 0.5)),
        WholeFrames(
            kept=torch.tensor([[0]]), source=torch.tensor([[1, 2, 3, 4]]),
            target=torch.tensor([[0, 0, 0, 0]]), num_places=1,
        ),
    ]  # fmt: skip
    for reducer in reducers:
        merged, sizes = reducer.apply(TOKENS.to(dtype), SIZES)
        assert merged.dtype == dtype
        assert sizes.dtype == torch.float32
        assert reducer.restore(merged).dtype == dtype
