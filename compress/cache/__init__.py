"""Caching in diffusion: what a denoiser computes in one step is used again in the next ones."""

from vcompress.compress.cache.apply import apply_cache
from vcompress.compress.cache.cached import Cached
from vcompress.compress.cache.calibrate import Trajectory, fit, observe
from vcompress.compress.cache.moment import Moment
from vcompress.compress.cache.report import CacheReport
from vcompress.spec.cache_section import CacheSection

__all__ = [
    "CacheReport", "CacheSection", "Cached", "Moment", "Trajectory", "apply_cache", "fit",
    "observe",
]  # fmt: skip
