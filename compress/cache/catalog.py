"""From the section of a plan to the policy that executes it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vcompress.compress.cache.policies.base import Policy
from vcompress.compress.cache.policies.easycache import EasyCache
from vcompress.compress.cache.policies.first_block import FirstBlock
from vcompress.compress.cache.policies.fixed import Fixed
from vcompress.compress.cache.policies.forecast import Forecast
from vcompress.compress.cache.policies.magcache import MagCache, resampled
from vcompress.compress.cache.policies.taylorseer import TaylorSeer
from vcompress.compress.cache.policies.teacache import TeaCache
from vcompress.compress.cache.policies.temporal_delta import TemporalDelta
from vcompress.spec.cache_section import SETTINGS, CacheSection

__all__ = ["POLICIES", "build_policy", "is_for"]

POLICIES: Mapping[str, type[Policy]] = MappingProxyType({
    "temporal_delta": TemporalDelta,
    "magcache": MagCache,
    "easycache": EasyCache,
    "teacache": TeaCache,
    "first_block": FirstBlock,
    "taylorseer": TaylorSeer,
    "fixed": Fixed,
    "forecast": Forecast,
})  # fmt: skip


def build_policy(section: CacheSection, num_steps: int) -> Policy:
    """The policy of `section` for a run of `num_steps`.

    A list of steps is for one number of steps; in a run of another everything is computed.
    """
    settings: dict[str, Any] = {name: getattr(section, name) for name in SETTINGS[section.policy]}
    # Who counts the steps is no matter of the policy.
    settings.pop("starts", None)
    if "magnitudes" in settings:
        settings["magnitudes"] = resampled(settings["magnitudes"], num_steps)
    if not is_for(section, num_steps):
        settings["compute_steps"] = tuple(range(num_steps))
    return POLICIES[section.policy](
        num_steps=num_steps, protect_first=section.protect_first,
        protect_last=section.protect_last, **settings,
    )  # fmt: skip


def is_for(section: CacheSection, num_steps: int) -> bool:
    """Whether what `section` lists step by step is for a run of `num_steps`."""
    return section.compute_steps is None or section.num_steps in (None, num_steps)
