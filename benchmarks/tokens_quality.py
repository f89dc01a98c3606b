"""Top-1 after token reduction, at equal operations; see `benchmarks/tokens.py`.

Every schedule is chosen on calibration clips and judged on the whole test set.
- constant: the same number of tokens taken in front of every block but the first by bipartite
  matching; the form of attention that loses less on the calibration clips.
- tome default: the same, always with proportional attention, as the paper has it for models that
  were trained with labels.
- a technique's name: its best starting shape on the calibration clips, without further search.
- drop, random: the controls, in the shape that is best for bipartite matching.
- centroids: its centres are fitted to the same calibration clips.
- search: `vcompress tokens --max-flops`.
Operations are the formula's; for the search those that really ran are counted beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vcompress.benchmarks import zoo
from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.decide import (
    NUM_SEARCH_CLIPS,
    DecidedTokens,
    refitted_on,
    trials_on,
)
from vcompress.compress.tokens.plan import constant_schedule, section_of
from vcompress.compress.tokens.readout import apply_readout, run_with_features
from vcompress.compress.tokens.rules import objection_to
from vcompress.compress.tokens.search import TokenSearch
from vcompress.compress.tokens.shapes import Candidate, Fitter, Site, starting_shapes
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.compress.tokens.trials import Trials
from vcompress.models.video import VideoModel
from vcompress.spec.token_section import TokenSection

__all__ = ["Scope", "measure", "table", "top1_percent"]

SHARES = (0.75, 0.5, 0.25)
NUM_CALIBRATION, NUM_TEST = 512, 10_000
_BATCH_SIZE = 50
_ATTENTIONS = ("plain", "proportional")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What of the table is measured, and on how much.

    Attributes:
        shares: of the operations.
        schedules: names as in the module; None for all.
        num_search: clips that schedules are chosen on.
        num_test: clips that they are judged on, at most as many as there are.
        num_refit: calibration clips that the readout is refitted on.
        max_moves: of the search, see `TokenSearch`.
        goes_on: the search begins with the schedule that is stored, where one is.
        seed: of the draws.
    """

    shares: tuple[float, ...] = SHARES
    schedules: tuple[str, ...] | None = None
    num_search: int = NUM_SEARCH_CLIPS
    num_test: int = NUM_TEST
    num_refit: int = NUM_CALIBRATION
    max_moves: int = 50
    goes_on: bool = False
    seed: int = 0

    def asks_for(self, name: str) -> bool:
        """Whether the schedule `name` is among those."""
        return self.schedules is None or name in self.schedules


def measure(name: str, scope: Scope, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Schedules of the module for the reference model `name`: the entry after each row.

    Args:
        name: "penvideo20" or "moving-fashion".
        scope: what to measure.
        known: the entry that is stored; rows that were measured on the same clips are kept.
    """
    from pathlib import Path

    bench = zoo.load(name, Path(), num_calibration=NUM_CALIBRATION, num_test=scope.num_test)
    test = [torch.from_numpy(batch) for batch in bench.test.batches(_BATCH_SIZE)]
    labels = torch.as_tensor(bench.labels)
    trials = trials_on(bench.model, bench.calibration, scope.seed, scope.num_search)
    everything = trials_on(bench.model, bench.calibration, scope.seed, scope.num_refit)
    entry: dict[str, Any] = {
        "model": {"name": name, "weights_sha256": bench.model.weights_sha256},
        "num_test_clips": len(labels), "num_search_clips": trials.num_clips,
        "num_refit_clips": scope.num_refit,
    }  # fmt: skip
    same = all(known.get(key) == value for key, value in entry.items())
    rows = {(row["share"], row["name"]): row for row in known["rows"]} if same else {}
    baseline = known["baseline_top1_percent"] if same else top1_percent(bench.model, test, labels)
    for share in scope.shares:
        for row_name, section, seconds in _schedules(trials, share, scope, rows):
            planned = bench.model.copy()
            refitted = refitted_on(everything, section)
            apply_reduction(planned, section, refitted.tensors)
            top1, top1_refitted = _judged(planned, refitted, test, labels)
            rows[share, row_name] = {
                "share": share, "name": row_name, "top1_percent": top1,
                "drop_points": baseline - top1,
                "drop_points_refitted": baseline - top1_refitted,
                "formula_share": Fitter(bench.model).share_of(section),
                "calibration_loss": trials.measure(section).loss, "seconds": seconds,
                "section": section.as_dict(),
                "counted_share": (
                    counted_flops(planned) / counted_flops(bench.model)
                    if row_name == "search" else None
                ),
                "max_moves": scope.max_moves if row_name == "search" else None,
            }  # fmt: skip
            print(
                f"{name} {share} {row_name}: {baseline - top1:.2f}, refitted "
                f"{baseline - top1_refitted:.2f}",
                flush=True,
            )
            ordered = sorted(rows.values(), key=_order)
            yield {**entry, "baseline_top1_percent": baseline, "rows": ordered}


def _judged(
    planned: VideoModel, refitted: DecidedTokens, test: list[torch.Tensor], labels: torch.Tensor
) -> tuple[float, float]:
    """Top-1 of a reduced model, and with its readout refitted, in one run."""
    assert refitted.section is not None
    readout = refitted.section.readout
    if readout is None:
        top1 = top1_percent(planned, test, labels)
        return top1, top1
    features = run_with_features(planned, test, readout)
    apply_readout(planned, readout, refitted.tensors)
    again = planned.layer(readout)(features.inputs)
    return _percent(features.outputs, labels), _percent(again, labels)


def _order(row: dict[str, Any]) -> tuple[float, int]:
    names = ["constant", "tome default", *TECHNIQUES, "search"]
    return -row["share"], names.index(row["name"])


def _schedules(
    trials: Trials, share: float, scope: Scope, rows: Mapping[tuple[float, str], dict[str, Any]]
) -> Iterator[tuple[str, TokenSection, float | None]]:
    """The search first, as it is what matters most to who stops this early."""
    fitter = Fitter(trials.model)
    if scope.asks_for("search"):
        started, known = time.perf_counter(), rows.get((share, "search"))
        search = TokenSearch(Trials(trials.model, trials.batches), scope.max_moves)
        if known is not None and scope.goes_on:
            found = search.improved(TokenSection.from_dict(known["section"]), share)
        else:
            found = search.at_share(share)
        yield "search", found.section, time.perf_counter() - started
    constant = {
        attention: section
        for attention in _ATTENTIONS
        if (section := _constant(trials.model, fitter, share, attention)) is not None
    }
    if constant and scope.asks_for("constant"):
        best = min(constant.values(), key=lambda section: trials.measure(section).loss)
        yield "constant", best, None
    if constant and scope.asks_for("tome default"):
        yield "tome default", constant["proportional"], None
    for name, technique in TECHNIQUES.items():
        if not scope.asks_for(name) or objection_to(trials.model, name) is not None:
            continue
        of_shape = "bipartite" if technique.is_control else name
        candidate = _best_shape(trials, fitter, of_shape, share)
        if candidate is None:
            continue
        section = fitter.fit(candidate.with_technique(name, candidate.attention), share)
        if section is not None:
            yield name, section, None


def _constant(
    model: VideoModel, fitter: Fitter, share: float, attention: str
) -> TokenSection | None:
    assert model.token_grid is not None
    for percent in range(100, 0, -1):
        counts = constant_schedule(
            model.token_grid.num_patches, len(model.token_blocks), percent / 100
        )
        section = section_of(model, counts, "bipartite", attention)
        if fitter.share_of(section) <= share:
            return section
    return None


def _best_shape(trials: Trials, fitter: Fitter, technique: str, share: float) -> Candidate | None:
    best: tuple[float, Candidate] | None = None
    for shape in starting_shapes(len(trials.model.token_blocks)):
        sites = tuple(Site(block, technique, left) for block, left in shape)
        for attention in _ATTENTIONS:
            candidate = Candidate(sites, attention)
            section = fitter.fit(candidate, share)
            if section is None:
                continue
            if trials.objection(section) is not None:
                continue
            loss = trials.measure(section, max(1, len(trials.batches) // 4)).loss
            if best is None or loss < best[0]:
                best = (loss, candidate)
    return None if best is None else best[1]


def counted_flops(model: VideoModel) -> int:
    """Operations of one clip as torch counts them while it runs."""
    # The fused kernels of the CPU are not in its table; their parts are.
    with (
        FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        model.module(model.example())
    return int(counter.get_total_flops())


def top1_percent(model: VideoModel, batches: list[torch.Tensor], labels: torch.Tensor) -> float:
    """Top-1 on the test clips."""
    return _percent(torch.cat([model(batch) for batch in batches]), labels)


def _percent(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * float((outputs.argmax(-1) == labels).float().mean())


def table(entries: dict[str, Any]) -> str:
    """Technique x share of the operations, in Markdown: points of top-1 lost."""
    lines: list[str] = []
    for name, entry in entries.items():
        by = {(row["name"], row["share"]): row for row in entry["rows"]}
        names = dict.fromkeys(row["name"] for row in entry["rows"])
        lines += [
            f"{name}: top-1 {entry['baseline_top1_percent']:.2f} % on "
            f"{entry['num_test_clips']:,} test clips; points lost at a share of the "
            "operations, and in brackets with the readout refitted",
            "",
            "| schedule | " + " | ".join(f"{share:.2f}" for share in SHARES) + " |",
            "|---" * (len(SHARES) + 1) + "|",
        ]
        for row in names:
            cells = [_cell(by.get((row, share))) for share in SHARES]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['drop_points']:.2f} ({row['drop_points_refitted']:.2f})"
