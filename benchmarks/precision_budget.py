"""Section `budget` of `benchmarks/precision.py`: our search against modelopt's `auto_quantize`.

Both get the same model, formats, calibration clips in the same batches, and a bound on effective
bits, each in its own count: theirs has 16 bits for a layer that is kept and no channel or tensor
scales, ours the bits that are stored, 32 for a kept float32 layer. Both plans become choices that
vcompress applies with plain rounding, and are judged on held-out clips. Since our count is the
stricter one, our search runs once more for each plan of the peer with the bits of this plan in our
count as its bound: `ours_at_its_bits`. Linear layers that receive the same tensor share a format in
our plans, as a runtime that fuses them needs it; in those of the peer they need not. What this
costs is shown by the same search without it, from the same predictions: `free`, in our count and at
the bits of the peer's plan, and `free_in_peer_count`, where the bound too is in the peer's count.

Seconds: both sides count the calibration of ranges on all calibration clips. Ours are `observe`,
freezing, prediction, grouping and the choice; those of the peer are in `peers/modelopt_auto.py`.
Ours run before the peer and once more behind it; the ratio takes the slower run. A further bound
of the same search reuses what comes before the choice, on both sides.
"""

from __future__ import annotations

import importlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vcompress.benchmarks.peers.modelopt_auto import (
    DEFAULT_CALIB_STEPS,
    DEFAULT_SCORE_STEPS,
    PeerPlan,
    search,
    to_plan,
)
from vcompress.benchmarks.peers.modelopt_setup import BITS, Method, modelopt
from vcompress.benchmarks.precision_judge import Judge, finite, warm_up
from vcompress.benchmarks.zoo import BenchModel
from vcompress.calib.observe import observe
from vcompress.calib.stats import Stats
from vcompress.compress.losses import loss_of
from vcompress.compress.mixed import NUM_COMPARISON_CLIPS, NUM_PREDICTION_CLIPS
from vcompress.compress.precision_search import (
    NUM_PROBES,
    Comparison,
    PrecisionSearch,
    comparison_of,
    freeze_candidates,
    predict_sensitivities,
)
from vcompress.compress.quantize import apply_choices
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import LayerChoice

__all__ = ["METHODS", "measure", "table"]

FORMATS = ("nvfp4", "int8", "fp8")
BOUNDS = (4.8, 5.5, 6.5)
METHODS: tuple[Method, ...] = ("gradient", "kl_div")
_MARGIN_BITS = 0.5
_NEEDS = frozenset({"input_amax", "outputs"})
_BATCH_SIZE = 8  # that of our search
_DEFAULTS = "gradient, documented defaults"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ours:
    """Our search up to the choice: what both choices and the judge need."""

    stats: Stats
    search: PrecisionSearch
    free: PrecisionSearch
    free_in_peer_count: PrecisionSearch
    comparison: Comparison
    seconds: Mapping[str, float]

    def choose(self, effective_bits: float) -> tuple[dict[str, str], dict[str, float]]:
        """The formats under a bound in our count, and the seconds of the search by part."""
        start = time.perf_counter()
        found = self.search.choose(effective_bits * self.search.num_weights, self.comparison)
        return dict(found.formats), {**self.seconds, "choose": time.perf_counter() - start}

    def choose_freely(
        self, effective_bits: float, *, in_peer_count: bool = False
    ) -> dict[str, str]:
        """The formats where layers that share an input need not share a format."""
        search = self.free_in_peer_count if in_peer_count else self.free
        found = search.choose(effective_bits * search.num_weights, self.comparison)
        return dict(found.formats)


class _InPeerCount(PrecisionSearch):
    """A search whose bits are those that modelopt counts."""

    def bits(self, formats: Mapping[str, str]) -> float:
        return sum(
            math.prod(self._model.layers[name].weight_shape) * BITS[format_name]
            for name, format_name in formats.items()
        )


def _prepare(bench: BenchModel, seed: int) -> _Ours:
    model, clips = bench.model, bench.calibration
    warm_up()
    times = [time.perf_counter()]
    layers = {name: model.layer(name) for name in model.layers}
    stats = observe(model, layers, clips, needs=_NEEDS, batch_size=_BATCH_SIZE)
    times.append(time.perf_counter())
    candidates = freeze_candidates(model, FORMATS, stats.input_amax)
    times.append(time.perf_counter())
    sensitivities = predict_sensitivities(
        model, candidates, clips, num_clips=NUM_PREDICTION_CLIPS, outputs=stats.outputs, seed=seed
    )
    times.append(time.perf_counter())
    precision_search = PrecisionSearch(model, candidates, sensitivities)
    comparison = comparison_of(model, clips, NUM_COMPARISON_CLIPS, outputs=stats.outputs, seed=seed)
    times.append(time.perf_counter())
    parts = zip(("calibrate", "freeze", "predict", "group"), pairwise(times), strict=True)
    return _Ours(
        stats=stats, search=precision_search, comparison=comparison,
        free=PrecisionSearch(model, candidates, sensitivities, share_inputs=False),
        free_in_peer_count=_InPeerCount(model, candidates, sensitivities, share_inputs=False),
        seconds={name: end - start for name, (start, end) in parts},
    )  # fmt: skip


def bits_in_peer_count(model: VideoModel, formats: Mapping[str, str]) -> float:
    """Effective bits as modelopt counts them, over all layers; those without a format are kept."""
    sizes = {name: math.prod(facts.weight_shape) for name, facts in model.layers.items()}
    bits = sum(size * BITS[formats.get(name, FLOAT)] for name, size in sizes.items())
    return bits / sum(sizes.values())


def bounds_of(model: VideoModel, ours: _Ours) -> tuple[list[float], dict[str, float], list[float]]:
    """Bounds that both can meet, the fewest bits in both counts, bounds that one cannot meet."""
    smallest = {
        name: min(
            (each for each in FORMATS if facts.objection(each) is None),
            key=BITS.__getitem__, default=FLOAT,
        )
        for name, facts in model.layers.items()
    }  # fmt: skip
    fewest = {
        "ours": ours.search.fewest_bits / ours.search.num_weights,
        "peer": bits_in_peer_count(model, smallest),
    }
    can = [bound for bound in BOUNDS if bound >= max(fewest.values())]
    cannot = [bound for bound in BOUNDS if bound not in can]
    if cannot:
        can = sorted({*can, round(max(fewest.values()) + _MARGIN_BITS, 2)})
    return can, fewest, cannot


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plans:
    """Judges plans, each only once."""

    bench: BenchModel
    ours: _Ours
    judge: Judge
    _known: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)

    def choices(self, formats: Mapping[str, str]) -> dict[str, LayerChoice]:
        return {
            name: LayerChoice(
                format=formats.get(name, FLOAT), reason="found by the search",
                input_amax=self.ours.stats.input_amax.get(name),
            )
            for name in self.bench.model.layers
        }  # fmt: skip

    def facts(self, choices: Mapping[str, LayerChoice]) -> dict[str, Any]:
        """What the plan costs, in both counts, and what it loses on the test clips."""
        formats = {name: choice.format for name, choice in choices.items()}
        key = tuple(formats.values())
        if key not in self._known:
            planned = self.bench.model.copy()
            apply_choices(planned, choices, {})
            self._known[key] = {
                **self.judge.judge(planned),
                "effective_bits_peer_count": finite(bits_in_peer_count(self.bench.model, formats)),
                "effective_bits_our_count": finite(self.bits(formats)),
                "num_layers": dict(Counter(formats.values())),
            }
        return dict(self._known[key])

    def bits(self, formats: Mapping[str, str]) -> float:
        """Effective bits in our count, over the layers that the clips reached."""
        layers = [name for group in self.ours.search.groups for name in group.layers]
        decided = {name: formats[name] for name in layers}
        return self.ours.search.bits(decided) / self.ours.search.num_weights


def measure(
    bench: BenchModel, *, methods: Sequence[Method], with_defaults: bool, seed: int
) -> dict[str, Any]:
    """Search under every bound with ours and with each method of the peer.

    Args:
        with_defaults: run the peer's "gradient" also with the number of steps that its
            documentation suggests, of one clip each; takes several times as long as all the rest.
    """
    importlib.import_module("scipy.optimize")
    modelopt()
    judge = Judge(bench)  # also warms the model up
    ours = _prepare(bench, seed)
    bounds, fewest, cannot = bounds_of(bench.model, ours)
    found = {bound: ours.choose(bound) for bound in bounds}
    peers: dict[str, list[PeerPlan] | str] = {
        method: _peer(bench, method, bounds, seed) for method in methods
    }
    if with_defaults:
        peers[_DEFAULTS] = _peer(bench, "gradient", bounds, seed, defaults=True)
    again = _prepare(bench, seed)
    plans = _Plans(bench=bench, ours=ours, judge=judge)
    rows = []
    for index, bound in enumerate(bounds):
        formats, first = found[bound]
        runs = [first, again.choose(bound)[1]]
        slower = max(sum(run.values()) for run in runs)
        compared = {
            name: result if isinstance(result, str) else _compared(plans, result[index], slower)
            for name, result in peers.items()
        }
        mine = {
            **plans.facts(plans.choices(formats)),
            "seconds": round(slower, 3),
            "seconds_of_runs": [
                {part: round(seconds, 3) for part, seconds in run.items()} for run in runs
            ],
        }
        ours_free = {
            "free": plans.facts(plans.choices(ours.choose_freely(bound))),
            "free_in_peer_count": _if_it_can(plans, bound),
        }
        rows.append({"effective_bits_at_most": bound, "ours": mine, **ours_free, "peers": compared})
    return {
        **judge.facts(),
        "formats": list(FORMATS),
        "fewest_effective_bits": {name: finite(value) for name, value in fewest.items()},
        "bounds_that_cannot_be_met": cannot,
        "steps": {
            "batch_size": _BATCH_SIZE,
            "calibration_clips": len(bench.calibration),
            "score_clips": min(NUM_PREDICTION_CLIPS, len(bench.calibration)),
            "our_probes": NUM_PROBES[loss_of(bench.model.task).name],
            "comparison_clips": min(NUM_COMPARISON_CLIPS, len(bench.calibration)),
            "documented_defaults": [DEFAULT_CALIB_STEPS, DEFAULT_SCORE_STEPS],
        },
        "rows": rows,
    }


def _if_it_can(plans: _Plans, bound: float) -> dict[str, Any] | None:
    """Ours without groups and in the peer's count; None where the bound is too low for that."""
    search = plans.ours.free_in_peer_count
    if bound * search.num_weights < search.fewest_bits:
        return None
    return plans.facts(plans.choices(plans.ours.choose_freely(bound, in_peer_count=True)))


def _peer(
    bench: BenchModel, method: Method, bounds: list[float], seed: int, *, defaults: bool = False
) -> list[PeerPlan] | str:
    """One plan for each bound, or why the peer could not."""
    clips = bench.calibration
    num_scored = min(NUM_PREDICTION_CLIPS, len(clips))
    size = 1 if defaults else min(_BATCH_SIZE, num_scored)
    try:
        return search(
            bench.model, clips, bounds, formats=FORMATS, method=method, batch_size=size, seed=seed,
            num_calib_steps=DEFAULT_CALIB_STEPS if defaults else math.ceil(len(clips) / size),
            num_score_steps=DEFAULT_SCORE_STEPS if defaults else num_scored // size,
        )  # fmt: skip
    except Exception as error:  # whatever ends the peer is a result, and must not end the rest
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _compared(plans: _Plans, peer: PeerPlan, our_seconds: float) -> dict[str, Any]:
    """The peer's plan, our search's time as a share of its own, and ours at its bits."""
    choices = to_plan(plans.bench.model, peer, plans.ours.stats)
    bits = plans.bits({name: choice.format for name, choice in choices.items()})
    search = plans.ours.search
    # Where layers share an input we have fewer plans; the cheapest may be above the peer's.
    formats, _ = plans.ours.choose(max(bits, search.fewest_bits / search.num_weights))
    freely = plans.ours.choose_freely(bits)
    return {
        **plans.facts(choices),
        "meets_the_bound": peer.satisfied,
        "seconds": round(peer.seconds, 3),
        "our_seconds_percent": finite(100 * our_seconds / peer.seconds),
        "ours_at_its_bits": plans.facts(plans.choices(formats)),
        "free_at_its_bits": plans.facts(plans.choices(freely)),
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each model, bound and peer, in Markdown; bits as "theirs / ours"."""
    lines = [
        "| model | bits | who | bits, peer's / our count | loss | metric | s | "
        "loss: ours / peer's | free | free, peer's count | at its bits | free, at its bits | "
        "time: ours / peer's % |",
        "|---" * 13 + "|",
    ]
    for name, entry in entries.items():
        if entry["bounds_that_cannot_be_met"]:
            cannot = ", ".join(f"{bound:g}" for bound in entry["bounds_that_cannot_be_met"])
            fewest = entry["fewest_effective_bits"]
            lines.append(
                f"| {name} | {cannot} | nobody: it takes {fewest['peer']:.2f} / "
                f"{fewest['ours']:.2f} |" + " |" * 10
            )
        for row in entry["rows"]:
            lines += _rows_of_bound(name, row)
    return "\n".join(lines)


def _rows_of_bound(name: str, row: Mapping[str, Any]) -> list[str]:
    bound = f"{row['effective_bits_at_most']:g}"
    lines = [
        f"| {name} | {bound} | {who} | {_plan_cells(facts)}" + " |" * 7
        for who, facts in (
            ("ours", row["ours"]), ("ours, free", row.get("free")),
            ("ours, free, peer's count", row.get("free_in_peer_count")),
        )
        if facts is not None
    ]  # fmt: skip
    for peer, result in row["peers"].items():
        if isinstance(result, str):
            lines.append(f"| {name} | {bound} | {peer} | {result} |" + " |" * 9)
            continue
        who = peer if result["meets_the_bound"] else f"{peer} (misses the bound)"
        rivals = (
            row["ours"], row.get("free"), row.get("free_in_peer_count"),
            result["ours_at_its_bits"], result.get("free_at_its_bits"),
        )  # fmt: skip
        ratios = " | ".join(_ratio(facts, result) for facts in rivals)
        lines.append(
            f"| {name} | {bound} | {who} | {_plan_cells(result)} | {ratios} | "
            f"{result['our_seconds_percent']:.1f} |"
        )
    return lines


def _plan_cells(facts: Mapping[str, Any]) -> str:
    bits = f"{facts['effective_bits_peer_count']:.2f} / {facts['effective_bits_our_count']:.2f}"
    loss, metric = (
        "not finite" if facts[key] is None else f"{facts[key]:.4g}" for key in ("loss", "metric")
    )
    return f"{bits} | {loss} | {metric} | " + (
        f"{facts['seconds']:.1f}" if "seconds" in facts else ""
    )


def _ratio(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any]) -> str:
    if ours is None or ours["loss"] is None or not theirs["loss"]:
        return "-"
    return f"{ours['loss'] / theirs['loss']:.2f}"
