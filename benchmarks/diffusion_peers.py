"""Caches of diffusers and cache-dit on the same pipeline, their thresholds found as ours are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from vcompress.pipeline.cache_sampler import Case, Sampler
from vcompress.pipeline.cache_search import Bar
from vcompress.validate.frames import Frames, psnr_db

__all__ = ["Peer", "climbed", "peers"]

_THRESHOLDS = tuple(round(0.03 * 1.3**rung, 3) for rung in range(12))


@dataclass(frozen=True)
class Peer:
    """A cache of someone else.

    Attributes:
        name: of it.
        applied: a context in which it works, for a setting.
        settings: from exact to fast.
    """

    name: str
    applied: Callable[[Any], AbstractContextManager[None]]
    settings: tuple[Any, ...]


@contextmanager
def _of_diffusers(sampler: Sampler, config: Any) -> Iterator[None]:
    for module in sampler.denoisers:
        module.enable_cache(config)  # type: ignore[operator]
    try:
        yield
    finally:
        for module in sampler.denoisers:
            module.disable_cache()  # type: ignore[operator]


@contextmanager
def _of_cache_dit(sampler: Sampler, threshold: float) -> Iterator[None]:
    """DBCache with one computed block in front."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold,
        max_warmup_steps=3, enable_separate_cfg=True, num_inference_steps=sampler.num_steps,
    )  # fmt: skip
    cache_dit.enable_cache(sampler.pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(sampler.pipe)


def peers(sampler: Sampler, magnitudes: tuple[float, ...]) -> list[Peer]:
    """Those that are installed; MagCache of diffusers is given our table of magnitudes."""
    import diffusers

    def first_block(threshold: float) -> Any:
        return _of_diffusers(sampler, diffusers.FirstBlockCacheConfig(threshold=threshold))

    def magcache(threshold: float) -> Any:
        config = diffusers.MagCacheConfig(
            threshold=threshold, num_inference_steps=sampler.num_steps,
            mag_ratios=torch.tensor(magnitudes),
        )  # fmt: skip
        return _of_diffusers(sampler, config)

    def taylorseer(interval: int) -> Any:
        config = diffusers.TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=3, max_order=1
        )
        return _of_diffusers(sampler, config)

    def fastercache(_: Any) -> Any:
        config = diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            current_timestep_callback=lambda: sampler.pipe.current_timestep,
            attention_weight_callback=lambda _module: 0.3, tensor_format="BCFHW",
        )  # fmt: skip
        return _of_diffusers(sampler, config)

    made = [
        Peer("diffusers FirstBlockCache", first_block, _THRESHOLDS),
        Peer("diffusers MagCache", magcache, _THRESHOLDS),
        Peer("diffusers TaylorSeer", taylorseer, (2, 3, 4)),
        Peer("diffusers FasterCache", fastercache, ("defaults",)),
    ]
    try:
        import cache_dit as _installed  # noqa: F401
    except ImportError:
        return made
    return [
        *made, Peer("cache-dit DBCache", lambda each: _of_cache_dit(sampler, each), _THRESHOLDS)
    ]  # fmt: skip


def climbed(
    peer: Peer, sampler: Sampler, cases: Sequence[Case], full: Sequence[Frames], bar: Bar
) -> list[Any]:
    """The fastest setting whose mean over `cases` reaches `bar`, and the next faster one.

    No margin is asked of it, and none of its failures is caught.
    """
    low, high, best = 0, len(peer.settings) - 1, -1
    while low <= high:
        middle = (low + high) // 2
        values = []
        for case, reference in zip(cases, full, strict=True):
            with peer.applied(peer.settings[middle]):
                values.append(psnr_db(reference, sampler.sample(case)))
            if bar.is_far(values[-1]):
                break
        if len(values) == len(cases) and mean(values) >= bar.least:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return list(peer.settings[max(best, 0) : best + 2])
