"""Whole models end to end: as they are, compiled, with torchao, and with what the product does.

Every way is a copy of its own on the device. Calls of all ways are timed in turn, then whole
generations; blocks are what is compiled, as diffusers recommends, on both sides.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vcompress.benchmarks.gpu.products import AMAX
from vcompress.benchmarks.gpu.subjects import Subject, absent, build_denoiser, build_recogniser
from vcompress.compress.attention_sites import apply_attention, find_attentions
from vcompress.compress.cache import Cached, CacheSection, apply_cache
from vcompress.compress.cache.stack import find_stack
from vcompress.compress.frozen import freeze
from vcompress.compress.kernels.execute import execute, resident_bytes
from vcompress.compress.tokens.attention_only import AttentionReduction, reduce_attention
from vcompress.compress.tokens.plan import constant_schedule, section_of
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.models.calls import Batch, call_of, run_module
from vcompress.pipeline.device_timing import time_in_turn
from vcompress.spec.attention_section import AttentionChoice

__all__ = ["cache_section", "freeze_blocks", "measure_whole"]

FP8, TORCHAO = "fp8_channel", "torchao fp8"
# Tokens of a recogniser that enter its last block, of those that enter the first.
KEPT_TOKENS = 0.5


@dataclass(frozen=True, kw_only=True)
class Way:
    """What is done to a model.

    Attributes:
        precision: format of the linear layers of blocks, or of the peer; None for bfloat16.
        attention: format of the products of attention.
        cache: whether steps are reused; of denoisers alone.
        tokens: whether tokens are merged.
    """

    precision: str | None = None
    attention: str | None = None
    cache: bool = False
    tokens: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        """For people."""
        parts = [self.precision or "bfloat16", self.attention and f"attention {self.attention}",
                 self.cache and "cache", self.tokens and "tokens"]  # fmt: skip
        return " + ".join(filter(None, parts)) + ("" if self.compiled else ", not compiled")


_PLAIN = (
    Way(compiled=False), Way(), Way(precision=TORCHAO), Way(precision=FP8),
    Way(precision="int8_token"), Way(precision="nvfp4"), Way(precision=FP8, attention="int8_fp8"),
)  # fmt: skip
WAYS = {
    "denoiser": (
        *_PLAIN, Way(cache=True), Way(precision=FP8, cache=True),
        Way(precision="nvfp4", cache=True),
        Way(precision=FP8, cache=True, tokens=True),
        Way(precision=FP8, attention="int8_fp8", cache=True),
    ),
    "recogniser": (*_PLAIN, Way(tokens=True), Way(precision=FP8, tokens=True)),
}  # fmt: skip


def cache_section(num_steps: int) -> CacheSection:
    """The policy that was chosen for the trained transformer at 30 dB, see docs/caching.md."""
    return CacheSection(
        policy="taylorseer", interval=3, order=2, protect_first=3, protect_last=1,
        num_steps=num_steps,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Made:
    module: nn.Module
    call: Callable[[], object]
    generate: Callable[[], object] | None
    cached: Cached | None


def measure_whole(subject: Subject, device: torch.device, *, small: bool) -> dict[str, Any]:
    """Seconds of a call and of a generation, memory, and speed-ups over compiled bfloat16."""
    if missing := absent(subject):
        return {"absent": missing}
    made: dict[str, _Made] = {}
    results: dict[str, dict[str, Any]] = {}
    for way in WAYS["recogniser" if subject.steps == 1 else "denoiser"]:
        if way.precision == TORCHAO and importlib.util.find_spec("torchao") is None:
            results[way.name] = {"absent": "torchao"}
            continue
        # A compiler for C++ is no part of a CPU's dry run.
        each = _make(subject, way, device, compiles=way.compiled and not small)
        made[way.name] = each
        results[way.name] = _memory(each, device)
    rounds = 2 if device.type == "cpu" else 3
    # A call of a cached model has no time of its own: it depends on the step.
    calls = {name: each.call for name, each in made.items() if each.cached is None}
    _add(results, "call", time_in_turn(calls, device, rounds=3 * rounds))
    generations = {name: each.generate for name, each in made.items() if each.generate}
    if generations:
        _add(results, "generation", time_in_turn(generations, device, rounds=rounds))
    for name, each in made.items():
        if each.cached is not None:
            results[name]["skip_rate"] = each.cached.report().skip_rate
    return {"steps": subject.steps, "tokens": subject.tokens, "ways": results}


def _make(subject: Subject, way: Way, device: torch.device, *, compiles: bool) -> _Made:
    if subject.steps == 1:
        return _recogniser(subject, way, device, compiles=compiles)
    module, call = build_denoiser(subject, device)

    def step(latent: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module(
            **{**call, "hidden_states": latent}, timestep=time, return_dict=False
        )[0]
        return found

    latent, time = call["hidden_states"], torch.full((subject.batch,), 999, device=device)
    example = call_of({**call, "timestep": time, "return_dict": False})
    _quantize(module, way, example)
    if way.tokens:
        settings = (
            AttentionReduction(window=(1, 2, 4)) if subject.depth < 4 else AttentionReduction()
        )
        reduce_attention(module, subject.grid, settings)
    if compiles:
        _compile(module, find_stack(module))
    cached = apply_cache(module, cache_section(subject.steps)) if way.cache else None

    def generate() -> torch.Tensor:
        if cached is not None:
            cached.reset(subject.steps)
        x = latent
        for now in torch.linspace(999, 1, subject.steps, device=device):
            # Small steps, as those of a sampler: a jump would be taken for another clip.
            x = x - step(x, now.expand(subject.batch)) * (0.1 / subject.steps)
        return x

    return _Made(module=module, call=lambda: step(latent, time), generate=generate, cached=cached)


def _recogniser(subject: Subject, way: Way, device: torch.device, *, compiles: bool) -> _Made:
    model = build_recogniser(subject)
    blocks, clips = model.token_blocks, model.example(subject.batch)
    if way.tokens:
        counts = constant_schedule(subject.tokens, subject.depth, KEPT_TOKENS)
        apply_reduction(model, section_of(model, counts, "bipartite", "proportional_fused"))
    module, batch = model.module.to(device, torch.bfloat16), clips.to(device)
    assert isinstance(batch, torch.Tensor)
    batch = batch.to(torch.bfloat16)
    _quantize(module, way, batch)
    if compiles:
        _compile(module, blocks)
    return _Made(module=module, call=lambda: run_module(module, batch), generate=None, cached=None)


def _quantize(module: nn.Module, way: Way, example: Batch) -> None:
    if way.precision == TORCHAO:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )

        quantize_(
            module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
            filter_fn=lambda each, name: _in_block(name) and isinstance(each, nn.Linear),
        )  # fmt: skip
    elif way.precision is not None:
        freeze_blocks(module, way.precision, lambda _: AMAX)
    if way.attention is not None:
        # Only where queries and keys are as many: what attends to text is a small part.
        own = [
            name
            for name, calls in find_attentions(module, example).items()
            if all(each.num_queries == each.num_keys for each in calls)
        ]
        choice = AttentionChoice(
            format=way.attention, reason="all", smooth_keys=True,
            query_amax=AMAX, key_amax=AMAX, value_amax=AMAX,
        )  # fmt: skip
        apply_attention(module, dict.fromkeys(own, choice))
    if way.attention is not None or way.precision not in {None, TORCHAO}:
        execute(module)


def freeze_blocks(module: nn.Module, format: str, amax: Callable[[str], float]) -> None:
    """Give every linear layer inside a block `format`; `amax` tells the range of its input."""
    for name, each in list(module.named_modules()):
        if isinstance(each, nn.Linear) and _in_block(name):
            parent, _, child = name.rpartition(".")
            frozen = freeze(each, format, amax(name), name=name)
            setattr(module.get_submodule(parent), child, frozen)


def _in_block(name: str) -> bool:
    return re.search(r"(blocks|layers?)\.\d+\.", name) is not None


def _compile(module: nn.Module, blocks: tuple[str, ...]) -> None:
    for name in blocks:
        block = module.get_submodule(name)
        # Its forward, and not the module: a cache stands in front of what is compiled.
        block.__dict__["forward"] = torch.compile(block.forward)


def _memory(made: _Made, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"resident_weight_bytes": resident_bytes(made.module)}
    if device.type == "cuda":
        (made.generate or made.call)()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (made.generate or made.call)()
        # Above the other ways, which are there, too; its own weights are to be added.
        result["peak_bytes_beside_weights"] = torch.cuda.max_memory_allocated() - before
    return result


def _add(
    results: dict[str, dict[str, Any]], what: str, times: dict[str, tuple[float, float]]
) -> None:
    kept = times[Way().name][0]
    for name, (seconds, spread) in times.items():
        results[name][what] = {"seconds": seconds, "spread": spread, "speedup": kept / seconds}
