"""Which attentions run their products in eight bits: calibrated, measured, refused where it hurts.

One pass over the calibration clips finds the ranges of queries, keys and values, with and without
smoothing of the keys. On a few of these clips the output of every attention is then computed in
each form beside the exact one; a format takes the form with the smaller error. Last, the enclosing
block is run with this attention alone in the format: that error is held against `max_layer_error`,
as that of a layer is (see `block_error`). Where there are several formats, the plan of the smallest
such errors is compared with those of one format each, by the loss of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from vcompress.calib.calls import Samples
from vcompress.compress.attention_errors import OutputErrors, output_errors, with_block_errors
from vcompress.compress.attention_products import attend_plainly
from vcompress.compress.attention_sites import (
    AttentionCall,
    attention_applied,
    find_attentions,
    intercepted,
    operands_of,
    sdpa_form,
)
from vcompress.compress.context import PlanContext
from vcompress.compress.latency_table import ModelTimes, find_operations
from vcompress.compress.losses import loss_of
from vcompress.models.calls import Batch
from vcompress.models.video import VideoModel
from vcompress.spec.attention_section import (
    PRODUCT_BITS,
    PRODUCT_FORMATS,
    AttentionChoice,
)
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT
from vcompress.spec.target import Target

__all__ = ["AUTO", "Ranges", "calibrate_attention", "decide_attention", "formats_of"]

AUTO = "auto"
_BATCH_SIZE = 8
_FLOAT_BITS = 32
_PRODUCTS_A_CALL = 2
_SLOWER = "no format has a time below that of float in the latency table"


@dataclass(kw_only=True)
class Ranges:
    """Largest magnitudes that the calls of one attention had, `smooth_key` of smoothed keys."""

    query: float = 0.0
    key: float = 0.0
    smooth_key: float = 0.0
    value: float = 0.0

    def choice(self, format_name: str, *, smooth_keys: bool) -> AttentionChoice:
        """The line of a plan with these ranges, without a reason."""
        return AttentionChoice(
            format=format_name, reason="", query_amax=self.query,
            key_amax=self.smooth_key if smooth_keys else self.key, value_amax=self.value,
            smooth_keys=smooth_keys,
        )  # fmt: skip


def formats_of(request: str, target: Target) -> tuple[str, ...]:
    """The formats that `request`, what follows `--attention`, allows on `target`.

    Raises:
        InputError: the target's hardware does not run the format.
    """
    if request == FLOAT:
        return ()
    if request == AUTO:
        return target.attention
    named = (*target.attention, *target.attention_by_name)
    if request not in named:
        allowed = ", ".join((*named, AUTO, FLOAT))
        message = (
            f"--attention {request} is nothing that hardware of --target {target.name} runs; "
            f"choose one of: {allowed}"
        )
        raise InputError(message)
    return (request,)


def calibrate_attention(
    model: VideoModel, clips: Samples, on_batch: Callable[[int], None] | None = None
) -> dict[str, Ranges]:
    """The ranges of every attention that `clips` reach, by full name."""
    found: dict[str, Ranges] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        query, key, value = operands_of(args, kwargs)
        ranges = found.setdefault(name, Ranges())
        ranges.query = _larger(ranges.query, query)
        ranges.key = _larger(ranges.key, key)
        ranges.smooth_key = _larger(ranges.smooth_key, key - key.mean(-2, keepdim=True))
        ranges.value = _larger(ranges.value, value)
        return attend_plainly(*args, **kwargs)

    with sdpa_form(model.module), intercepted(model.module, note):
        for batch in clips.tensors(_BATCH_SIZE):
            model(batch)
            if on_batch is not None:
                on_batch(len(batch))
    return {name: ranges for name, ranges in found.items() if name}


def _larger(amax: float, x: torch.Tensor) -> float:
    # NaN has to win, which Python's max does not promise.
    seen = float(x.abs().amax())
    return seen if math.isnan(seen) or seen > amax else amax


def decide_attention(
    model: VideoModel, context: PlanContext
) -> tuple[dict[str, AttentionChoice], dict[str, object]] | None:
    """A line for every attention of `model`, and what the lines rest on; None to leave all alone.

    Raises:
        InputError: the target has no such format.
    """
    formats = formats_of(context.attention, context.target)
    if not formats:
        return None
    calls = find_attentions(model.module, model.example(1))
    times = None
    if context.latency is not None:
        times = ModelTimes(context.latency, find_operations(model))
    with context.stage("calibrate attention", len(context.calibration)) as advance:
        ranges = calibrate_attention(model, context.calibration, advance)
    candidates = {
        name: [
            seen.choice(each, smooth_keys=smooth)
            for each in _faster(name, formats, times)
            for smooth in (False, True)
        ]
        for name, seen in ranges.items()
        if name in calls and _is_finite(seen)
    }
    errors = output_errors(model, candidates, context.clips)
    best = {
        name: [min(of_format, key=lambda one: _order(errors[name, one]))
               for of_format in _by_format(choices)]
        for name, choices in candidates.items()
        if any((name, choice) in errors for choice in choices)
    }  # fmt: skip
    with context.stage("attention in its block", len(best)) as advance:
        scored = with_block_errors(model, best, context.clips, advance)

    def lines_with(preferred: str | None) -> dict[str, AttentionChoice]:
        return {
            name: AttentionChoice(format=FLOAT, reason=_SLOWER)
            if name in candidates and not candidates[name]
            else _line(name, scored.get(name, ()), ranges.get(name), errors, context, preferred)
            for name in calls
        }

    # Errors of one size can be of several kinds: those of INT8 probabilities are alike for many
    # tokens, and add up from block to block as others do not. So whole plans are compared.
    plans = [lines_with(preferred) for preferred in (None, *formats)]
    lines = plans[0] if len(formats) == 1 else min(plans, key=partial(_loss, model, context.clips))
    return lines, _evidence(lines, calls)


def _faster(name: str, formats: Sequence[str], times: ModelTimes | None) -> list[str]:
    """Those of `formats` that take less time than float by the table, if there is one."""
    if times is None:
        return list(formats)
    kept = times.of(name, FLOAT)
    found = [(each, times.of(name, each)) for each in formats]
    return [each for each, time in found if kept is not None and time is not None and time < kept]


def _is_finite(ranges: Ranges) -> bool:
    return all(map(math.isfinite, (ranges.query, ranges.key, ranges.smooth_key, ranges.value)))


def _by_format(choices: Sequence[AttentionChoice]) -> list[list[AttentionChoice]]:
    names = dict.fromkeys(choice.format for choice in choices)
    return [[choice for choice in choices if choice.format == name] for name in names]


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _loss(model: VideoModel, clips: Batch, lines: Mapping[str, AttentionChoice]) -> float:
    """Mean loss of the task on `clips` with all of `lines`; infinite where it is not finite."""
    reference = model(clips)
    with attention_applied(model.module, lines):
        return _order(float(loss_of(model.task).values(reference, model(clips)).mean()))


def _line(
    name: str, choices: Sequence[AttentionChoice], ranges: Ranges | None, errors: OutputErrors,
    context: PlanContext, preferred: str | None,
) -> AttentionChoice:  # fmt: skip
    """The line of one attention, with its reason; in the `preferred` format if it can bear it."""
    if ranges is None:
        return AttentionChoice(format=FLOAT, reason="no calibration clip reached this attention")
    if not _is_finite(ranges):
        reason = "queries, keys or values are not finite on calibration clips"
        return AttentionChoice(format=FLOAT, reason=reason)
    if not choices:
        reason = "the clips that errors are measured on do not reach this attention, others do"
        return AttentionChoice(format=FLOAT, reason=reason)
    limit = context.max_layer_error
    within = [one for one in choices if one.score is not None and one.score <= limit]
    chosen = min(
        [one for one in within if one.format == preferred] or choices,
        key=lambda one: _order(one.score if one.score is not None else 0.0),
    )
    own = errors[name, replace(chosen, score=None)]
    measured = f"error {chosen.score:.2%} of the block's output ({own:.2%} of its own)"
    if within:
        return replace(chosen, reason=f"{measured} within {limit:.2%}")
    reason = f"{chosen.format} would cause {measured}, above {limit:.2%}"
    score = chosen.score if chosen.score is not None and math.isfinite(chosen.score) else None
    return AttentionChoice(format=FLOAT, reason=reason, score=score)


def _evidence(
    lines: Mapping[str, AttentionChoice], calls: Mapping[str, Sequence[AttentionCall]]
) -> dict[str, object]:
    """How many products run in which format, and what a value that enters one costs."""
    products: dict[str, int] = {}
    bits = count = 0.0
    for name, choice in lines.items():
        for call in calls[name]:
            entering = (
                call.num_rows * call.width * (call.num_queries + call.num_keys),
                call.num_rows * call.num_keys * (call.num_queries + call.value_width),
            )
            formats = PRODUCT_FORMATS.get(choice.format, (FLOAT, FLOAT))
            for values, format_name in zip(entering, formats, strict=True):
                bits += values * (_FLOAT_BITS if format_name == FLOAT else PRODUCT_BITS)
                count += values
            products[choice.format] = products.get(choice.format, 0) + _PRODUCTS_A_CALL
    return {"products": products, "bits_per_operand_value": round(bits / max(count, 1), 4)}
