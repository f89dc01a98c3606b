"""Section `budget` of `benchmarks/precision.py`: our search against modelopt's `auto_quantize`.

Both get the same model, formats, calibration clips in the same batches, and a bound on effective
bits, each in its own count (see `precision_plans`). Both plans become choices that vcompress
applies with plain rounding, and are judged on held-out clips. Our count is the stricter one, so our
search runs once more for each plan of the peer, with the bits of this plan in our count as its
bound: `in_our_count`.

Linear layers that receive the same tensor share a format in our plans, as a runtime that fuses them
needs it; in those of the peer they need not. So both are searched both ways: `free` is our search
without this rule, from the same predictions, and "one format an input" is the peer with it.

`shipped` is what the product makes of the bound, with its layers calibrated; the peer's plans are
rounded plainly, as `auto_quantize` leaves them with these formats.

The peer is handed the calibration clips as its loader and its own numbers of steps, which the end
of the loader cuts short: it calibrates and scores on all clips. In "16 scored" it scores as few
clips as we predict from; for "kl_div" alone, which is brute force, there is nothing else. The
"documented defaults" are 512 and 128 steps of one clip each.

Seconds are those of the processor, all threads together. Both sides count the calibration of ranges
on all calibration clips. Ours are `observe`, freezing, prediction, grouping and the choice; those
of the peer are in `peers/modelopt_auto.py`. Ours run before the peer and once more behind it; the
ratio takes the slower run. A further bound of the same search reuses what comes before the choice,
on both sides.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vcompress.benchmarks.peers.modelopt_auto import (
    DEFAULT_CALIB_STEPS,
    DEFAULT_SCORE_STEPS,
    PeerPlan,
    search,
)
from vcompress.benchmarks.peers.modelopt_setup import BITS, Method, modelopt
from vcompress.benchmarks.precision_judge import Judge, finite, warm_up
from vcompress.benchmarks.precision_plans import Judged, Plans, bits_in_peer_count
from vcompress.benchmarks.zoo import BenchModel
from vcompress.calib.observe import observe
from vcompress.calib.stats import Stats
from vcompress.compress.choice_loss import Comparison, comparison_of
from vcompress.compress.mixed import NUM_COMPARISON_CLIPS, NUM_PREDICTION_CLIPS
from vcompress.compress.precision_search import PrecisionSearch
from vcompress.compress.sensitivities import NUM_PROBES, freeze_candidates, predict_sensitivities
from vcompress.models.video import VideoModel
from vcompress.spec.formats import FLOAT

__all__ = ["PEERS", "measure", "table"]

FORMATS = ("nvfp4", "int8", "fp8")
BOUNDS = (4.8, 5.5, 6.5)
_MARGIN_BITS = 0.5
_NEEDS = frozenset({"input_amax", "outputs"})
_BATCH_SIZE = 8  # that of our search


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """How modelopt's search is run; see the module."""

    method: Method = "gradient"
    few_scored: bool = False
    grouped: bool = False
    defaults: bool = False


PEERS: Mapping[str, _Peer] = {
    "gradient": _Peer(),
    "gradient, one format an input": _Peer(grouped=True),
    "gradient, 16 scored": _Peer(few_scored=True),
    "kl_div, 16 scored": _Peer(method="kl_div", few_scored=True),
    "gradient, documented defaults": _Peer(defaults=True),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ours:
    """Our search up to the choice: what all choices and the judge need."""

    stats: Stats
    grouped: PrecisionSearch
    free: PrecisionSearch
    comparison: Comparison
    seconds: Mapping[str, float]

    def choose(self, effective_bits: float) -> tuple[dict[str, str], dict[str, float]]:
        """The formats under a bound in our count, and the seconds of the search by part."""
        start = time.process_time()
        formats = self.formats(effective_bits, free=False)
        return formats, {**self.seconds, "choose": time.process_time() - start}

    def formats(self, effective_bits: float, *, free: bool) -> dict[str, str]:
        """The formats under a bound in our count."""
        search = self.free if free else self.grouped
        # Where layers share an input we have fewer plans; the cheapest may be above the bound.
        bits = max(effective_bits * search.num_weights, search.fewest_bits)
        return dict(search.choose(bits, self.comparison).formats)


def _prepare(bench: BenchModel, seed: int) -> _Ours:
    model, clips = bench.model, bench.calibration
    warm_up()
    times = [time.process_time()]
    layers = {name: model.layer(name) for name in model.layers}
    stats = observe(model, layers, clips, needs=_NEEDS, batch_size=_BATCH_SIZE)
    times.append(time.process_time())
    candidates = freeze_candidates(model, FORMATS, stats.input_amax)
    times.append(time.process_time())
    sensitivities = predict_sensitivities(
        model, candidates, clips, num_clips=NUM_PREDICTION_CLIPS, outputs=stats.outputs, seed=seed
    )
    times.append(time.process_time())
    grouped = PrecisionSearch(model, candidates, sensitivities)
    comparison = comparison_of(model, clips, NUM_COMPARISON_CLIPS, outputs=stats.outputs, seed=seed)
    times.append(time.process_time())
    parts = zip(("calibrate", "freeze", "predict", "group"), pairwise(times), strict=True)
    return _Ours(
        stats=stats, grouped=grouped, comparison=comparison,
        free=PrecisionSearch(model, candidates, sensitivities, share_inputs=False),
        seconds={name: end - start for name, (start, end) in parts},
    )  # fmt: skip


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
        "ours": ours.grouped.fewest_bits / ours.grouped.num_weights,
        "peer": bits_in_peer_count(model, smallest),
    }
    can = [bound for bound in BOUNDS if bound >= max(fewest.values())]
    cannot = [bound for bound in BOUNDS if bound not in can]
    if cannot:
        can = sorted({*can, round(max(fewest.values()) + _MARGIN_BITS, 2)})
    return can, fewest, cannot


def measure(bench: BenchModel, *, peers: Sequence[str], seed: int) -> dict[str, Any]:
    """Search under every bound with ours and with each of `peers`."""
    importlib.import_module("scipy.optimize")
    modelopt()
    judge = Judge(bench)  # also warms the model up
    ours = _prepare(bench, seed)
    bounds, fewest, cannot = bounds_of(bench.model, ours)
    found = {bound: ours.choose(bound) for bound in bounds}
    theirs = {name: _search(bench, PEERS[name], bounds, ours, seed) for name in peers}
    again = _prepare(bench, seed)
    plans = Plans(
        bench=bench, judge=judge, stats=ours.stats, search=ours.grouped, formats=FORMATS, seed=seed
    )
    rows = []
    for index, bound in enumerate(bounds):
        formats, first = found[bound]
        runs = [first, again.choose(bound)[1]]
        slower = max(sum(run.values()) for run in runs)
        own = {False: formats, True: ours.formats(bound, free=True)}
        shipped = plans.shipped(bound)
        compared = {
            name: result
            if isinstance(result, str)
            else _compared(plans, ours, result[index], own, shipped, slower)
            for name, result in theirs.items()
        }
        mine = {
            **plans.judged(formats).facts,
            "seconds": round(slower, 3),
            "seconds_of_runs": [
                {part: round(seconds, 3) for part, seconds in run.items()} for run in runs
            ],
        }
        rows.append({
            "effective_bits_at_most": bound, "ours": mine,
            "free": dict(plans.judged(own[True]).facts), "peers": compared,
            **({} if shipped is None else {"shipped": dict(shipped.facts)}),
        })  # fmt: skip
    return {
        **judge.facts(),
        "formats": list(FORMATS),
        "fewest_effective_bits": {name: finite(value) for name, value in fewest.items()},
        "bounds_that_cannot_be_met": cannot,
        "steps": {
            "batch_size": _BATCH_SIZE,
            "calibration_clips": len(bench.calibration),
            "prediction_clips": min(NUM_PREDICTION_CLIPS, len(bench.calibration)),
            "our_probes": NUM_PROBES,
            "comparison_clips": min(NUM_COMPARISON_CLIPS, len(bench.calibration)),
            "documented_defaults": [DEFAULT_CALIB_STEPS, DEFAULT_SCORE_STEPS],
        },
        "rows": rows,
    }


def _search(
    bench: BenchModel, peer: _Peer, bounds: list[float], ours: _Ours, seed: int
) -> list[PeerPlan] | str:
    """One plan for each bound, or why the peer could not."""
    clips = bench.calibration
    num_scored = min(NUM_PREDICTION_CLIPS, len(clips)) if peer.few_scored else len(clips)
    size = 1 if peer.defaults else min(_BATCH_SIZE, num_scored)
    try:
        return search(
            bench.model, clips, bounds, formats=FORMATS, method=peer.method, batch_size=size,
            seed=seed, groups=[each.layers for each in ours.grouped.groups] if peer.grouped else (),
            num_calib_steps=DEFAULT_CALIB_STEPS if peer.defaults else math.ceil(len(clips) / size),
            num_score_steps=DEFAULT_SCORE_STEPS if peer.defaults else math.ceil(num_scored / size),
        )  # fmt: skip
    except Exception as error:  # whatever ends the peer is a result, and must not end the rest
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _compared(
    plans: Plans, ours: _Ours, peer: PeerPlan, own: Mapping[bool, Mapping[str, str]],
    shipped: Judged | None, our_seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """The peer's plan, the losses of ours over its loss, and our seconds as a share of its own.

    Args:
        own: our plans under the same bound in our own count; the key says whether it is free.
        shipped: what the product makes of the same bound in our own count.
    """
    theirs = plans.judged(peer.formats)
    bits = theirs.facts["effective_bits_our_count"]
    ratios = {}
    for name, free in (("ours", False), ("free", True)):
        at_its_bits = plans.judged(ours.formats(bits, free=free))
        ratios[name] = {
            "in_own_counts": plans.judged(own[free]).over(theirs),
            "in_our_count": at_its_bits.over(theirs),
        }
    if shipped is not None:
        ratios["shipped"] = {"in_own_counts": shipped.over(theirs)}
    return {
        **theirs.facts,
        "meets_the_bound": peer.satisfied,
        "seconds": round(peer.seconds, 3),
        "our_seconds_percent": finite(100 * our_seconds / peer.seconds),
        "loss_over_peer": ratios,
    }


def table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each model, bound and peer, in Markdown; bits as "theirs / ours"."""
    lines = [
        "| model | bits | who | bits, peer's / our count | loss | metric | s | time: ours / peer's "
        "| loss: free ours / peer's, own counts | our count | loss: ours / peer's, own counts "
        "| our count | loss: shipped / peer's |",
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
        f"| {name} | {bound} | {who} | {_plan_cells(row[key])}" + " |" * 7
        for who, key in (("ours", "ours"), ("ours, free", "free"), ("shipped", "shipped"))
        if key in row
    ]
    for peer, result in row["peers"].items():
        if isinstance(result, str):
            lines.append(f"| {name} | {bound} | {peer} | {result} |" + " |" * 9)
            continue
        who = peer if result["meets_the_bound"] else f"{peer} (misses the bound)"
        ratios = " | ".join(
            _ratio(result["loss_over_peer"][ours][count])
            for ours in ("free", "ours")
            for count in ("in_own_counts", "in_our_count")
        )
        shipped = result["loss_over_peer"].get("shipped", {}).get("in_own_counts")
        ratios += f" | {'' if shipped is None else _ratio(shipped)}"
        lines.append(
            f"| {name} | {bound} | {who} | {_plan_cells(result)} | "
            f"{result['our_seconds_percent']:.0f} % | {ratios} |"
        )
    return lines


def _plan_cells(facts: Mapping[str, Any]) -> str:
    theirs = facts.get("effective_bits_peer_count")
    bits = f"{'' if theirs is None else f'{theirs:.2f}'} / {facts['effective_bits_our_count']:.2f}"
    loss, metric = (
        "not finite" if facts[key] is None else f"{facts[key]:.4g}" for key in ("loss", "metric")
    )
    return f"{bits} | {loss} | {metric} | " + (
        f"{facts['seconds']:.1f}" if "seconds" in facts else ""
    )


def _ratio(ratio: Mapping[str, float | None]) -> str:
    if any(value is None for value in ratio.values()):
        return "-"
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
