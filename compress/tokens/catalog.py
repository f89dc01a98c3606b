"""The techniques by their name in a plan, with what each needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from vcompress.compress.tokens.pixels import PixelFeature
from vcompress.compress.tokens.reduction import Chain, Reducer
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
from vcompress.compress.tokens.view import View
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = ["TECHNIQUES", "Technique", "find_technique"]

# From keys `[B T, L, D]`, T and how many places leave.
PlaceMatch = Callable[[torch.Tensor, int, int], Reducer]


@dataclass(frozen=True, kw_only=True)
class Technique:
    """One way to reduce tokens.

    Attributes:
        reduce: from what stands in front of a block to a reduction to `keep` tokens a sequence.
        source: the paper.
        needs_attention: reads query and key of the block before, so it cannot stand first.
        needs_raster: reads the places of tokens in frames, so nothing may have mixed them before.
        pixels: what it reads off the pixels of the clip, if anything.
        num_whole_frames: how many frames of a raster it always keeps whole.
        raster: what becomes of a raster of frames: "lost"; "places", the same ones go in all
            frames; "frames", whole ones go.
        conserves: no patch is lost: the sizes always sum to the number of patches.
        is_fitted: needs a tensor that calibration finds for each of its places.
        is_control: only to be compared with.
    """

    reduce: Callable[[View, int], Reducer]
    source: str
    needs_attention: bool = False
    needs_raster: bool = False
    pixels: PixelFeature | None = None
    num_whole_frames: int = 0
    raster: Literal["lost", "places", "frames"] = "lost"
    conserves: bool = True
    is_fitted: bool = False
    is_control: bool = False


def _in_rounds(
    once: Callable[..., Reducer], keep: int, sizes: torch.Tensor, *features: torch.Tensor,
    unit: int = 1,
) -> Reducer:  # fmt: skip
    """Matching again and again, at most half of the tokens each time, until `keep` are left.

    Args:
        once: from how many tokens to give away, and the features, to a round.
        keep: tokens that are left, a multiple of `unit`.
        sizes: `[B, N]`.
        *features: `[B, N, ...]`, what `once` looks at; each round averages them as it does tokens.
        unit: tokens go by so many at once.
    """
    parts: list[Reducer] = []
    left = sizes.shape[1]
    while left > keep:
        if parts:
            reduced = [parts[-1].apply(feature, sizes) for feature in features]
            features, sizes = tuple(feature for feature, _ in reduced), reduced[0][1]
        fewer = min(left - keep, left // (2 * unit) * unit)
        parts.append(once(fewer, *features))
        left -= fewer
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _bipartite(view: View, keep: int) -> Reducer:
    return _in_rounds(lambda r, keys: bipartite.match(keys, r), keep, view.sizes, view.keys)


def _saliency(view: View, keep: int) -> Reducer:
    assert view.attention is not None
    salient = saliency.saliency(saliency.sharpness(view.attention, view.num_special))

    def once(merges: int, tokens: torch.Tensor, column: torch.Tensor) -> Reducer:
        return saliency.match(tokens, column[..., 0], merges)

    return _in_rounds(once, keep, view.sizes, view.tokens, salient[..., None])


def _energy(view: View, keep: int) -> Reducer:
    return _in_rounds(lambda r, keys: energy.match(keys, r), keep, view.sizes, view.keys)


def _static_frames(view: View, keep: int) -> Reducer:
    assert view.num_frames is not None
    return static_frames.reduce(view.pixels["change"], view.num_frames, keep)


def _centroids(view: View, _keep: int) -> Reducer:
    assert view.centers is not None
    if view.centers.shape[1] != view.keys.shape[2]:
        message = (
            f"the centres of a token site have {view.centers.shape[1]} channels, the keys there "
            f"{view.keys.shape[2]}; make the plan again"
        )
        raise InputError(message)
    return centroids.reduce(view.keys, view.centers)


def _places(view: View, keep: int, match: PlaceMatch = places.match) -> Reducer:
    assert view.num_frames is not None
    num_frames, num_left = view.num_frames, keep // view.num_frames
    of_frame = _in_rounds(
        lambda r, keys: match(keys, num_frames, r),
        num_left,
        torch.unflatten(view.sizes, 1, (num_frames, -1)).flatten(0, 1),
        torch.unflatten(view.keys, 1, (num_frames, -1)).flatten(0, 1),
    )
    return places.InEveryFrame(places=of_frame, num_frames=num_frames, num_left=num_left)


def _random_places(view: View, keep: int) -> Reducer:
    assert view.num_frames is not None
    num_frames, num_left = view.num_frames, keep // view.num_frames
    of_frame = controls.random(
        torch.unflatten(view.tokens, 1, (num_frames, -1)).flatten(0, 1), num_left
    )
    return places.InEveryFrame(places=of_frame, num_frames=num_frames, num_left=num_left)


def _frames(view: View, keep: int) -> Reducer:
    assert view.num_frames is not None
    num_places = view.sizes.shape[1] // view.num_frames

    def once(fewer: int, keys: torch.Tensor) -> Reducer:
        return frames.match(keys, keys.shape[1] // num_places, fewer // num_places)

    return _in_rounds(once, keep, view.sizes, view.keys, unit=num_places)


def _grouped(view: View, keep: int) -> Reducer:
    assert view.attention is not None
    scores = grouped.attention_received(view.attention, view.num_special)
    return grouped.reduce(scores, view.keys, view.num_frames or 1, keep)


def _temporal_sampling(view: View, keep: int) -> Reducer:
    assert view.num_frames is not None
    left = keep * view.num_frames // view.sizes.shape[1]
    return temporal_sampling.reduce(view.tokens, view.num_frames, left)


def _drop(view: View, keep: int) -> Reducer:
    return _in_rounds(lambda r, keys: controls.drop(keys, r), keep, view.sizes, view.keys)


def _detail(view: View, keep: int) -> Reducer:
    return detail.reduce(view.pixels["detail"], view.keys, keep)


_TOME = "Bolya et al., 2022, arXiv:2210.09461"
_CONTROLS = "Pollard and Wray, 2025, arXiv:2506.03885"

TECHNIQUES: Mapping[str, Technique] = MappingProxyType({
    "bipartite": Technique(reduce=_bipartite, source=_TOME),
    "saliency": Technique(
        reduce=_saliency, source="Choi et al., 2024, arXiv:2403.13347", needs_attention=True,
        conserves=False,
    ),
    "energy": Technique(reduce=_energy, source="Tran et al., 2024, arXiv:2405.16148"),
    "static_frames": Technique(
        reduce=_static_frames, source="Choudhury et al., 2024, arXiv:2411.05222",
        needs_raster=True, pixels="change", num_whole_frames=1,
    ),
    "detail": Technique(
        reduce=_detail, source="Choudhury et al., 2025, arXiv:2510.18091", pixels="detail"
    ),
    "centroids": Technique(
        reduce=_centroids, source="Wang and Yang, 2024, arXiv:2407.15219", is_fitted=True
    ),
    "places": Technique(
        reduce=_places, source=f"{_TOME}, with one matching for all frames", needs_raster=True,
        raster="places",
    ),
    "frames": Technique(
        reduce=_frames, source="Ren et al., 2023, arXiv:2310.19060", needs_raster=True,
        raster="frames",
    ),
    "grouped": Technique(
        reduce=_grouped, source="Pan et al., 2021, arXiv:2106.12620", needs_attention=True,
        conserves=False,
    ),
    "temporal_sampling": Technique(
        reduce=_temporal_sampling, source="Jiang et al., 2025, arXiv:2503.04130",
        needs_raster=True, raster="frames",
    ),
    "drop": Technique(reduce=_drop, source=_CONTROLS, conserves=False, is_control=True),
    "random": Technique(
        reduce=lambda view, keep: controls.random(view.tokens, keep), source=_CONTROLS,
        is_control=True,
    ),
    "drop_places": Technique(
        reduce=lambda view, keep: _places(view, keep, controls.drop_places), source=_CONTROLS,
        needs_raster=True, raster="places", conserves=False, is_control=True,
    ),
    "random_places": Technique(
        reduce=_random_places, source=_CONTROLS, needs_raster=True, raster="places",
        is_control=True,
    ),
})  # fmt: skip


def find_technique(name: str, where: str) -> Technique:
    """The technique called `name`; `where` names the place in the plan.

    Raises:
        InputError: there is none.
    """
    if name not in TECHNIQUES:
        message = (
            f"{where}: unknown technique {name!r}{nearest(name, TECHNIQUES)}; known: "
            f"{', '.join(TECHNIQUES)}"
        )
        raise InputError(message)
    return TECHNIQUES[name]
