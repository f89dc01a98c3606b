"""Centroid merging: every new token is a soft average around a centre that calibration found.

Source: learnable token merging (Wang and Yang, 2024, arXiv:2407.15219) multiplies tokens by a mask
that a trained module writes. What we changed: nothing is trained. The centres are those of weighted
spherical k-means on keys of calibration clips, begun as k-means++ (Arthur and Vassilvitskii, 2007);
the mask is softmax(cosine(key, centre) / temperature). Temperatures are tried on the same clips.

Two products and a softmax: no TopK, no gather, any number of tokens. The price is that assignment
is soft and that the centres know only what calibration showed.

Shapes: B sequences, N tokens, P centres, D width of a key, M keys to fit.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vcompress.compress.tokens.reduction import Mixing

__all__ = ["fit", "fit_centroids", "reduce"]

_MAX_ROUNDS = 25
# Keys that centres are fitted to, and tokens that a temperature is judged on.
_MAX_KEYS = 4096
# At the least, a share of a token is at least exp(-2 / 0.03), whose logarithm is finite.
_TEMPERATURES = (0.03, 0.06, 0.12, 0.25)


def fit_centroids(keys: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Centres of `keys` by direction, where long keys count more.

    The same keys and the same seed give the same centres. A centre that nothing belongs to stays
    where it was.

    Args:
        keys: `[M, D]`, on the CPU.
        count: P, in 1..M.
        generator: draws the first centres.

    Returns:
        `[P, D]`, of length 1.
    """
    assert 1 <= count <= len(keys)
    weight = torch.linalg.vector_norm(keys.double(), dim=-1)
    unit = functional.normalize(keys.double(), dim=-1)
    centers, nearest = _first_centers(unit, weight, count, generator), None
    for _ in range(_MAX_ROUNDS):
        before, nearest = nearest, (unit @ centers.T).argmax(dim=1)
        if before is not None and torch.equal(before, nearest):
            break
        sums = torch.zeros_like(centers).index_add_(0, nearest, unit * weight[:, None])
        is_empty = torch.linalg.vector_norm(sums, dim=1, keepdim=True) < 1e-12
        centers = torch.where(is_empty, centers, functional.normalize(sums, dim=1))
    return centers.to(keys.dtype)


def reduce(keys: torch.Tensor, centers: torch.Tensor) -> Mixing:
    """Divide each token among the centres that its key is like.

    Args:
        keys: `[B, N, D]`.
        centers: `[P, D]`, each as long as 1 / temperature: the colder, the harder the assignment.
    """
    unit = functional.normalize(keys.float(), dim=-1)
    return Mixing(shares=(unit @ centers.to(unit).T).softmax(dim=-1))


def fit(
    keys: torch.Tensor, tokens: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Centres for `reduce`, at the temperature at which most of the tokens comes back.

    Args:
        keys: `[B, N, D]`, of calibration clips, on the CPU.
        tokens: `[B, N, C]`, of the same.
        count: P.
        generator: draws the keys that are looked at, and the first centres.
    """
    every = keys.flatten(0, 1)
    few = max(_MAX_KEYS, 8 * count)
    seen = every[torch.randperm(len(every), generator=generator)[:few]]
    sequences = -(-_MAX_KEYS // keys.shape[1])
    keys, tokens = keys[:sequences], tokens[:sequences]
    centers = fit_centroids(seen, count, generator)
    sizes = torch.ones_like(tokens[..., 0])

    def error(temperature: float) -> float:
        mixing = reduce(keys, centers / temperature)
        back = mixing.restore(mixing.apply(tokens, sizes)[0])
        return float(torch.linalg.vector_norm(back - tokens))

    return centers / min(_TEMPERATURES, key=error)


def _first_centers(
    unit: torch.Tensor, weight: torch.Tensor, count: int, generator: torch.Generator
) -> torch.Tensor:
    """Keys drawn one after the other, by their weight and their distance to those drawn before."""
    chosen = [_drawn(weight, generator)]
    distance = torch.full_like(weight, torch.inf)
    for _ in range(count - 1):
        # Half of the squared distance between unit vectors; below 0 it is rounding.
        distance = torch.minimum(distance, (1 - unit @ unit[chosen[-1]]).clamp(min=0))
        distance[chosen[-1]] = 0.0
        chosen.append(_drawn(weight * distance, generator))
    return unit[chosen]


def _drawn(mass: torch.Tensor, generator: torch.Generator) -> int:
    """An index with probability in proportion to `mass`."""
    edges = mass.cumsum(0)
    point = torch.rand((), generator=generator, dtype=mass.dtype) * edges[-1]
    return min(int(torch.searchsorted(edges, point, right=True)), len(mass) - 1)
