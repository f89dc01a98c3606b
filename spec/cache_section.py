"""The section `cache` of a plan: what of a denoising run is computed once and used again, and when.

Step n counts the denoising steps of one generation from 0. Which settings a policy reads stands in
`SETTINGS`; any other is an error, since it would be ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import check_keys, nearest

__all__ = ["LEAST_STEPS", "MOST_WEIGHTS", "SETTINGS", "CacheSection"]

# A run of fewer steps has no two that are alike enough; everything is computed.
LEAST_STEPS = 8

# Computed outputs that stand for one that is not.
MOST_WEIGHTS = 3

# What each policy reads, with its default.
SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "temporal_delta": {"threshold": 0.1, "max_skips": 2},
    "magcache": {"threshold": 0.12, "max_skips": 4, "magnitudes": ()},
    "easycache": {"threshold": 0.05, "max_skips": None},
    "teacache": {
        "threshold": 0.1, "max_skips": None, "coefficients": (1.0, 0.0), "signal_range": None,
    },
    "first_block": {"threshold": 0.08, "max_skips": None, "front_blocks": 1, "back_blocks": 0},
    "taylorseer": {"interval": 4, "order": 1, "compute_steps": None},
    "fixed": {"interval": 2, "compute_steps": None},
    "forecast": {"compute_steps": (), "mixture": (), "starts": (0,)},
})  # fmt: skip

# Plans of one denoiser do without.
_OPTIONAL = ("starts",)
_COMMON = ("policy", "num_steps", "protect_first", "protect_last", "blocks")


@dataclass(frozen=True, kw_only=True)
class CacheSection:
    """One cache policy with its settings; None stands for the policy's default.

    Attributes:
        policy: a name in `SETTINGS`.
        num_steps: denoising steps of a run; None if the pipeline tells it. What a pipeline tells
            is taken in any case.
        protect_first, protect_last: so many steps at either end are always computed. More is
            closer to the full model and slower; the first step and, where noise is low, the last
            ones matter most.
        blocks: full names of the blocks, in order; none to find them by structure.
        threshold: how much change, summed as the policy's formula says, a reuse may stand for.
            Higher is faster and less exact.
        max_skips: steps in a row that may be reused. By default 2 in temporal_delta, 4 in magcache
            and any number elsewhere.
        interval: one step of so many is computed.
        order: of the Taylor expansion, 0 to 3.
        front_blocks, back_blocks: blocks at either end of the stack that always run.
        compute_steps: the computed steps one by one, in place of `interval`.
        mixture: for every step the weights of the last computed outputs, newest first, that stand
            for it; none where it is computed. From calibration, and for one number of steps.
        starts: first step of every denoiser of the run, two in Wan 2.2. Steps count on from one to
            the next.
        magnitudes: how the residual's length grows from step to step, from calibration.
        coefficients: of the polynomial, highest power first, from calibration.
        signal_range: smallest and largest change that the polynomial was fitted to.
    """

    policy: str
    num_steps: int | None = None
    protect_first: int = 3
    protect_last: int = 1
    blocks: tuple[str, ...] = ()
    threshold: float | None = None
    max_skips: int | None = None
    interval: int | None = None
    order: int | None = None
    front_blocks: int | None = None
    back_blocks: int | None = None
    compute_steps: tuple[int, ...] | None = None
    mixture: tuple[tuple[float, ...], ...] | None = None
    starts: tuple[int, ...] | None = None
    magnitudes: tuple[float, ...] | None = None
    coefficients: tuple[float, ...] | None = None
    signal_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.policy not in SETTINGS:
            message = (
                f"cache.policy: unknown policy {self.policy!r}{nearest(str(self.policy), SETTINGS)}"
                f"; known: {', '.join(SETTINGS)}"
            )
            raise InputError(message)
        _whole(self.num_steps, "num_steps", least=1, optional=True)
        _whole(self.protect_first, "protect_first", least=0)
        _whole(self.protect_last, "protect_last", least=0)
        _names(self.blocks)
        settings = SETTINGS[self.policy]
        for name, check in _CHECKS.items():
            if name in settings:
                if getattr(self, name) is None:
                    object.__setattr__(self, name, settings[name])
                check(getattr(self, name), name)
            elif getattr(self, name) is not None:
                message = (
                    f"cache.{name}: policy {self.policy} does not read it; it reads "
                    f"{', '.join(settings)}"
                )
                raise InputError(message)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what all policies have, then what this one reads."""
        names = (*_COMMON, *SETTINGS[self.policy])
        values = ((name, getattr(self, name)) for name in names)
        return {name: _lists(value) for name, value in values}

    @classmethod
    def from_dict(cls, data: Any) -> CacheSection:
        """Read the section; everything that is wrong is an `InputError`."""
        policy = data.get("policy") if isinstance(data, dict) else None
        if isinstance(policy, str) and policy in SETTINGS:
            required = [name for name in SETTINGS[policy] if name not in _OPTIONAL]
            optional = [name for name in SETTINGS[policy] if name in _OPTIONAL]
            check_keys(data, required=(*_COMMON, *required), optional=optional, where="cache")
        elif isinstance(policy, str):
            cls(policy=policy)
        else:
            message = f"cache must be an object with a policy of {', '.join(SETTINGS)}"
            raise InputError(message)
        settings: dict[str, Any] = {name: _tuples(value) for name, value in data.items()}
        return cls(**settings)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _whole(value: Any, name: str, *, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    # JSON's true is an integer for Python.
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = f"an integer >= {least}{' or null' if optional else ''}"
        message = f"cache.{name} must be {kind}, got {value!r}"
        raise InputError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        message = f"cache.blocks must be a list of names of blocks, got {value!r}"
        raise InputError(message)


def _threshold(value: Any, name: str) -> None:
    if not _is_number(value) or value < 0:
        message = f"cache.{name} must be a number >= 0, got {value!r}"
        raise InputError(message)


def _order(value: Any, name: str) -> None:
    _whole(value, name, least=0)
    if value > 3:
        message = f"cache.{name} must be at most 3, got {value}; 1 is the usual one"
        raise InputError(message)


def _numbers(value: Any, name: str, *, least: int) -> None:
    good = isinstance(value, tuple) and len(value) >= least and all(map(_is_number, value))
    if not good:
        message = f"cache.{name} must be a list of at least {least} numbers, got {value!r}"
        raise InputError(message)


def _range(value: Any, name: str) -> None:
    if value is None:
        return
    _numbers(value, name, least=2)
    if len(value) != 2 or value[0] > value[1]:
        message = f"cache.{name} must be [smallest, largest], got {list(value)}"
        raise InputError(message)


def _mixture(value: Any, name: str) -> None:
    if not isinstance(value, tuple):
        message = f"cache.{name} must be a list with the weights of every step, got {value!r}"
        raise InputError(message)
    for weights in value:
        _numbers(weights, name, least=0)
        if len(weights) > MOST_WEIGHTS:
            message = f"cache.{name}: a step has at most {MOST_WEIGHTS} weights, got {len(weights)}"
            raise InputError(message)


def _steps(value: Any, name: str) -> None:
    if value is None:
        return
    if not isinstance(value, tuple):
        message = f"cache.{name} must be a list of steps or null, got {value!r}"
        raise InputError(message)
    for step in value:
        _whole(step, name, least=0)


def _starts(value: Any, name: str) -> None:
    _steps(value, name)
    if not value or value[0] != 0 or list(value) != sorted(set(value)):
        message = f"cache.{name} must be rising steps from 0, got {value!r}"
        raise InputError(message)


_CHECKS: Mapping[str, Callable[[Any, str], None]] = MappingProxyType({
    "threshold": _threshold,
    "max_skips": lambda value, name: _whole(value, name, least=0, optional=True),
    "interval": lambda value, name: _whole(value, name, least=1),
    "order": _order,
    "front_blocks": lambda value, name: _whole(value, name, least=1),
    "back_blocks": lambda value, name: _whole(value, name, least=0),
    "compute_steps": _steps,
    "mixture": _mixture,
    "starts": _starts,
    "magnitudes": lambda value, name: _numbers(value, name, least=0),
    "coefficients": lambda value, name: _numbers(value, name, least=1),
    "signal_range": _range,
})  # fmt: skip
