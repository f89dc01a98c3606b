"""From the section of a plan to the policy that executes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from vcompress.compress.cache.policies.base import Policy
from vcompress.compress.cache.policies.easycache import EasyCache
from vcompress.compress.cache.policies.first_block import FirstBlock
from vcompress.compress.cache.policies.fixed import Fixed
from vcompress.compress.cache.policies.magcache import MagCache, resampled
from vcompress.compress.cache.policies.taylorseer import TaylorSeer
from vcompress.compress.cache.policies.teacache import TeaCache
from vcompress.compress.cache.policies.temporal_delta import TemporalDelta
from vcompress.spec.cache_section import SETTINGS, CacheSection

__all__ = ["POLICIES", "build_policy"]

POLICIES: Mapping[str, Callable[..., Policy]] = MappingProxyType({
    "temporal_delta": TemporalDelta,
    "magcache": MagCache,
    "easycache": EasyCache,
    "teacache": TeaCache,
    "first_block": FirstBlock,
    "taylorseer": TaylorSeer,
    "fixed": Fixed,
})  # fmt: skip


def build_policy(section: CacheSection, num_steps: int) -> Policy:
    """The policy of `section` for a run of `num_steps`."""
    settings: dict[str, Any] = {name: getattr(section, name) for name in SETTINGS[section.policy]}
    if "magnitudes" in settings:
        settings["magnitudes"] = resampled(settings["magnitudes"], num_steps)
    return POLICIES[section.policy](
        num_steps=num_steps, protect_first=section.protect_first,
        protect_last=section.protect_last, **settings,
    )  # fmt: skip
