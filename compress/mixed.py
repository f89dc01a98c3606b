"""Formats for every layer under a budget: `--target mixed`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vcompress.compress.attention_sites import exact_attention, products_of
from vcompress.compress.calibration import extra_bits
from vcompress.compress.choice_loss import Comparison, comparison_of, outputs_of_choice
from vcompress.compress.context import PlanContext
from vcompress.compress.effects import Candidates
from vcompress.compress.latency_table import LatencyTable, ModelTimes, find_operations
from vcompress.compress.losses import TaskLoss
from vcompress.compress.precision_search import Found, PrecisionSearch
from vcompress.compress.sensitivities import Sensitivities, freeze_candidates, predict_sensitivities
from vcompress.models.video import VideoModel
from vcompress.spec.budget import Budget
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FLOAT, FORMATS

__all__ = ["MixedFormats", "find_formats"]

# Clips serve better than probes for the same time; what they reach is in docs/precision.md.
NUM_PREDICTION_CLIPS = 16
NUM_COMPARISON_CLIPS = 8
_BISECTIONS = 7
_SCALE_BITS = 32
# Calibration clips are few and were seen: the bar is kept with a reserve there.
_SQNR_RESERVE_DB = 1.0


@dataclass(frozen=True, kw_only=True)
class MixedFormats:
    """What the search found.

    Attributes:
        formats: layer -> format; layers that the clips did not reach are absent.
        reasons: layer -> why, for people.
        scores: layer -> predicted loss in its format.
        evidence: what the choice rests on, for the plan.
    """

    formats: Mapping[str, str]
    reasons: Mapping[str, str]
    scores: Mapping[str, float]
    evidence: Mapping[str, object]


def find_formats(model: VideoModel, context: PlanContext) -> MixedFormats:
    """Search formats of the target under `context.budget`.

    Raises:
        InputError: the budget cannot be met.
    """
    assert context.budget is not None
    times = None
    formats = context.target.formats
    if context.latency is not None:
        times = ModelTimes(context.latency, find_operations(model))
        formats = tuple(each for each in formats if each in context.latency.formats)
    frozen = freeze_candidates(model, formats, context.stats.input_amax)
    candidates, slower = _without_slower(frozen, times)
    # Gradients pass through no rounding.
    with (
        exact_attention(model.module),
        context.stage("sensitivity", NUM_PREDICTION_CLIPS) as advance,
    ):
        sensitivities = predict_sensitivities(
            model, candidates, context.calibration, num_clips=NUM_PREDICTION_CLIPS,
            outputs=context.stats.outputs, seed=context.seed, on_batch=advance,
        )  # fmt: skip
    with context.stage("allocate", None):
        search = PrecisionSearch(
            model, candidates, sensitivities,
            lambda name, format_name: extra_bits(
                model, name, format_name, context.algorithm, context.budget
            ),
            cost_of=None if times is None else times.together,
        )  # fmt: skip
        # A bar of quality is judged on all clips: each is a part of a point.
        on_size = context.budget.kind in ("effective_bits", "weight_bytes", "latency_share")
        num_clips = NUM_COMPARISON_CLIPS if on_size else len(context.calibration)
        comparison = comparison_of(
            model, context.calibration, num_clips, outputs=context.stats.outputs,
            seed=context.seed,
        )  # fmt: skip
        found = (
            _under(context.budget, model, candidates, search, comparison)
            if times is None
            else _within_time(context.budget, model, candidates, search, comparison, times)
        )
    return MixedFormats(
        formats=found.formats,
        reasons={
            name: _reason(model, name, format_name, candidates, sensitivities, slower.get(name, ""))
            for name, format_name in found.formats.items()
        },
        scores={
            name: sensitivities.of(name, format_name) or 0.0
            for name, format_name in found.formats.items()
        },
        evidence={
            "budget": {"kind": context.budget.kind, "limit": context.budget.limit},
            "loss": sensitivities.loss.name,
            "predicted_loss_if_additive": found.summed_loss,
            "predicted_loss": found.joint_loss,
            "calibration_loss": found.measured_loss,
            "num_prediction_clips": sensitivities.num_clips,
            "num_comparison_clips": len(comparison.clips),
            "num_probes": sensitivities.num_probes,
            **(
                {
                    "bits": round(found.bits / max(1, search.num_weights), 4),
                    "trade_off": _trade_off(search),
                }
                if context.latency is None or times is None
                else _time_evidence(context.latency, times, model, found)
            ),
        },
    )


def _trade_off(search: PrecisionSearch) -> list[list[float]]:
    """Bits a weight and predicted loss of the choices that no other one beats in both."""
    return [
        [round(cost / max(1, search.num_weights), 4), float(f"{loss:.4g}")]
        for cost, loss in search.trade_off()
    ]


def _without_slower(
    candidates: Candidates, times: ModelTimes | None
) -> tuple[Candidates, dict[str, str]]:
    """The candidates that save time where times are known, and of others what they take."""
    if times is None:
        return candidates, {}
    slower = {}
    for name, forms in candidates.items():
        ratios = {each: times.slowdown(name, each) for each in forms}
        ratios = {each: ratio for each, ratio in ratios.items() if ratio and ratio >= 1}
        if ratios:
            slower[name] = ratios
    faster = {
        name: {each: form for each, form in forms.items() if each not in slower.get(name, ())}
        for name, forms in candidates.items()
    }
    return faster, {
        name: "; not faster than float: "
        + ", ".join(f"{each} takes {ratio:.2f} times as long" for each, ratio in ratios.items())
        for name, ratios in slower.items()
    }


def _under(
    budget: Budget, model: VideoModel, candidates: Candidates, search: PrecisionSearch,
    comparison: Comparison,
) -> Found:  # fmt: skip
    if budget.kind == "effective_bits":
        fewest = search.fewest_bits / max(1, search.num_weights)
        if budget.limit < fewest:
            message = (
                f"--budget-bits must be at least {_rounded_up(fewest, 3):g} for this model, these "
                f"formats and this algorithm, got {budget.limit:g}; raise it"
            )
            raise InputError(message)
        return search.choose(budget.limit * search.num_weights, comparison)
    if budget.kind == "weight_bytes":
        rest = _bits_of_rest(model, candidates)
        if budget.limit * 8 < rest + search.fewest_bits:
            message = (
                f"--max-size must be at least {math.ceil((rest + search.fewest_bits) / 8)} bytes "
                f"for this model, these formats and this algorithm, got {budget.limit:.0f}; "
                f"{rest / 8e6:.3f} MB of it stay as they are; raise it"
            )
            raise InputError(message)
        return search.choose(budget.limit * 8 - rest, comparison)
    return _cheapest(budget, model, candidates, search, comparison)


def _within_time(
    budget: Budget, model: VideoModel, candidates: Candidates, search: PrecisionSearch,
    comparison: Comparison, times: ModelTimes,
) -> Found:  # fmt: skip
    """The least loss within a share of the float model's time."""
    rest = times.rest(candidates) - _saved_by_attention(model, times)
    least = sum(min(option.cost for option in group.options) for group in search.groups)
    if budget.limit * times.model_seconds < (rest + least) * (1 - 1e-9):
        share = (rest + least) / times.model_seconds
        message = (
            f"--max-latency must be at least {_rounded_up(share, 3):g} for this model by this "
            f"latency table, got {budget.limit:g}; {rest / times.model_seconds:.1%} of the time is "
            "spent outside of the layers that are decided; raise it"
        )
        raise InputError(message)
    return search.choose(budget.limit * times.model_seconds - rest, comparison)


def _saved_by_attention(model: VideoModel, times: ModelTimes) -> float:
    """Seconds that attentions in eight bits take less than float ones."""
    return sum(
        (times.of(name, FLOAT) or 0.0) - (times.of(name, products.format) or 0.0)
        for name, products in products_of(model.module).items()
        if times.of(name, products.format) is not None
    )


def _time_evidence(
    table: LatencyTable, times: ModelTimes, model: VideoModel, found: Found
) -> dict[str, object]:
    """What the plan says of time, and the table that it rests on."""
    saved = _saved_by_attention(model, times)
    seconds = times.rest(found.formats) - saved + (times.together(found.formats) or 0.0)
    return {
        "latency_share_by_table": round(seconds / times.model_seconds, 4),
        "latency_table": table.as_dict(),
    }


def _rounded_up(value: float, digits: int) -> float:
    return math.ceil(value * 10.0**digits) / 10.0**digits


def _bits_of_rest(model: VideoModel, candidates: Candidates) -> int:
    """Bits of all parameters but the weights that are decided, and of the layers' input scales.

    A weight that something else uses too (an embedding that is the head) stays there as it is.
    """
    decided = {model.layer(name) for name in candidates}
    stays = {
        parameter
        for module in model.module.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (module in decided and name == "weight")
    }
    scales = _SCALE_BITS * len(candidates)
    return scales + sum(8 * parameter.numel() * parameter.element_size() for parameter in stays)


def _cheapest(
    budget: Budget, model: VideoModel, candidates: Candidates, search: PrecisionSearch,
    comparison: Comparison,
) -> Found:  # fmt: skip
    """The fewest bits whose plan keeps the bar on the calibration clips, by bisection."""

    def meets(found: Found) -> bool:
        outputs = outputs_of_choice(model, candidates, found.formats, comparison.batches)
        return _within_bar(budget, comparison.references, outputs)

    if not search.groups:
        return search.choose(0.0, comparison)
    low = search.fewest_bits
    high = sum(max(option.cost for option in group.options) for group in search.groups)
    best = search.choose(high, comparison)
    for _ in range(_BISECTIONS):
        # Bits matter by their ratio.
        middle = math.sqrt(low * high)
        found = search.choose(middle, comparison)
        if meets(found):
            best, high = found, found.bits
        else:
            low = middle
    return best


def _within_bar(
    budget: Budget, references: list[torch.Tensor], outputs: list[torch.Tensor]
) -> bool:
    reference, output = torch.cat(references).double(), torch.cat(outputs).double()
    if not bool(output.isfinite().all()):
        return False
    if budget.kind == "sqnr_db":
        error = (output - reference).square().sum()
        sqnr = 10 * math.log10(float(reference.square().sum() / error)) if error > 0 else math.inf
        return sqnr >= budget.limit + _SQNR_RESERVE_DB
    # A clip whose class changes may be one that was wrong before: the drop is at most this.
    changed = (reference.argmax(-1) != output.argmax(-1)).double().mean()
    return 100 * float(changed) <= budget.limit


def _reason(
    model: VideoModel, name: str, chosen: str, candidates: Candidates,
    sensitivities: Sensitivities, slower: str,
) -> str:  # fmt: skip
    unit = _UNITS[sensitivities.loss.name]
    if not candidates[name]:
        if slower:
            return f"kept{slower}"
        objections = (model.layers[name].objection(each) for each in FORMATS)
        return f"kept: {next(each for each in objections if each is not None)}"
    alone = {format_name: sensitivities.of(name, format_name) for format_name in candidates[name]}
    if all(loss is None for loss in alone.values()):
        return (
            f"kept: none of the {sensitivities.num_clips} clips that losses are predicted from "
            "reached this layer"
        )
    others = ", ".join(
        f"{format_name} {loss:.1e}"
        for format_name, loss in alone.items()
        if loss is not None and format_name != chosen
    )
    loss = sensitivities.of(name, chosen)
    how = "measured" if name in sensitivities.measured else "predicted"
    own = "kept" if chosen == FLOAT else f"{how} loss {loss:.1e} {unit}"
    return (f"{own} ({others})" if others else own) + slower


_UNITS: Mapping[str, str] = {
    TaskLoss("kl_nats").name: "nats",
    TaskLoss("squared_relative_error").name: "of the output's energy",
}
