"""Put a cache around the denoisers of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vcompress.compress.cache.cached import Cached
from vcompress.compress.cache.catalog import POLICIES, build_policy, is_for
from vcompress.compress.cache.denoiser import Denoiser
from vcompress.compress.cache.gates import ForwardGate
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import InputError

__all__ = ["Denoisers", "apply_cache", "cache_of", "denoisers_of"]

Denoisers = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


def apply_cache(
    modules: Denoisers, section: CacheSection, *, scheduler: Any = None,
    timestep: str | None = None,
) -> Cached:  # fmt: skip
    """Cache what `section` says; the pipeline that calls the modules runs on as it is.

        cached = apply_cache(pipe.transformer, CacheSection(policy="magcache", num_steps=50))
        video = pipe(prompt="a cat", num_inference_steps=50)
        print(cached.report())

    Args:
        modules: the denoiser, changed in place until `Cached.remove`; or those that take turns in
            one run, as the two of Wan 2.2 do.
        section: policy and settings.
        scheduler: a diffusers scheduler; with it every generation is known to start, and its
            number of steps.
        timestep: name of the denoiser's argument, if it is an unusual one.

    Raises:
        InputError: a cache is there already, blocks or timestep are not found, or the policy wants
            more blocks than there are.
    """
    denoisers = denoisers_of(modules, section.blocks, timestep)
    for denoiser in denoisers.values():
        _check(denoiser, section)
    cached = Cached(
        section.policy, denoisers, lambda num_steps: build_policy(section, num_steps),
        section.num_steps, lambda num_steps: _notes(section, num_steps),
        shared_by=len(section.starts or ()),
    )  # fmt: skip
    if scheduler is not None:
        cached.follow(scheduler)
    return cached


def cache_of(module: nn.Module) -> Cached | None:
    """The cache that is applied to `module`, if there is one."""
    gate = vars(module).get("forward")
    owner = gate.owner if isinstance(gate, ForwardGate) else None
    return owner if isinstance(owner, Cached) else None


def denoisers_of(
    modules: Denoisers, blocks: tuple[str, ...] = (), timestep: str | None = None
) -> dict[str, Denoiser]:
    """The denoisers by name: what diffusers calls them, where several have none.

    Raises:
        InputError: no denoiser, a cache that is there already, or blocks or timestep are not found.
    """
    if isinstance(modules, nn.Module):
        named: Mapping[str, nn.Module] = {"": modules}
    elif isinstance(modules, Mapping):
        named = modules
    else:
        # Pipelines hold None in the place of a second denoiser that they have not.
        present = [module for module in modules if module is not None]
        names = ["transformer", *(f"transformer_{index}" for index in range(2, len(present) + 1))]
        named = dict(zip(names if len(present) > 1 else [""], present, strict=False))
    if not named:
        message = "a cache is put around at least one denoiser, got none; give pipe.transformer"
        raise InputError(message)
    for module in named.values():
        if isinstance(vars(module).get("forward"), ForwardGate):
            message = (
                f"{type(module).__name__} has a cache already; call remove() of the one that "
                "apply_cache returned first"
            )
            raise InputError(message)
        if getattr(module, "is_cache_enabled", False):
            message = (
                f"{type(module).__name__} has a cache of diffusers; call its disable_cache() first"
            )
            raise InputError(message)
    return {name: Denoiser.of(name, module, blocks, timestep) for name, module in named.items()}


def _check(denoiser: Denoiser, section: CacheSection) -> None:
    wanted = 0 if POLICIES[section.policy].level == "model" else 1
    wanted += (section.front_blocks or 0) + (section.back_blocks or 0)
    if len(denoiser.blocks) < wanted:
        message = (
            f"policy {section.policy} needs at least {wanted} blocks of one class in a list, "
            f"{type(denoiser.module).__name__} has {len(denoiser.blocks)} that are found by "
            "structure; name others in cache.blocks, or take the policy easycache, which needs none"
        )
        raise InputError(message)


def _notes(section: CacheSection, num_steps: int) -> tuple[str, ...]:
    if not is_for(section, num_steps):
        return (
            f"the steps to compute were found for runs of {section.num_steps}, this one has "
            f"{num_steps}, so everything is computed; find a cache for {num_steps} steps",
        )
    if section.policy == "magcache" and not section.magnitudes:
        return (
            f"magcache has no magnitudes, so it reuses {section.max_skips} steps in a row whatever "
            "they are; fit the section first",
        )
    if section.policy == "teacache" and section.coefficients == (1.0, 0.0):
        return ("teacache has no fitted polynomial; thresholds of papers do not apply",)
    return ()
