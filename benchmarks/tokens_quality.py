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
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vcompress.benchmarks import zoo
from vcompress.compress.tokens.catalog import TECHNIQUES
from vcompress.compress.tokens.decide import trials_on, with_readout
from vcompress.compress.tokens.plan import constant_schedule, section_of
from vcompress.compress.tokens.readout import apply_readout
from vcompress.compress.tokens.rules import objection_to
from vcompress.compress.tokens.search import TokenSearch
from vcompress.compress.tokens.shapes import Candidate, Fitter, Site, starting_shapes
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.compress.tokens.trials import Trials
from vcompress.models.video import VideoModel
from vcompress.spec.token_section import TokenSection

__all__ = ["measure", "table", "top1_percent"]

SHARES = (0.75, 0.5, 0.25)
NUM_CALIBRATION, NUM_TEST = 512, 10_000
_BATCH_SIZE = 50
_ATTENTIONS = ("plain", "proportional")


def measure(name: str, *, seed: int) -> dict[str, Any]:
    """All schedules of the module for the reference model `name`."""
    from pathlib import Path

    bench = zoo.load(name, Path(), num_calibration=NUM_CALIBRATION, num_test=NUM_TEST)
    test = [torch.from_numpy(batch) for batch in bench.test.batches(_BATCH_SIZE)]
    labels = torch.as_tensor(bench.labels)
    trials = trials_on(bench.model, bench.calibration, seed)
    baseline = top1_percent(bench.model, test, labels)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for row_name, section, seconds in _schedules(trials, share):
            planned = bench.model.copy()
            refitted = with_readout(bench.model, section, bench.calibration, seed)
            apply_reduction(planned, section, refitted.tensors)
            top1 = top1_percent(planned, test, labels)
            top1_refitted = top1
            assert refitted.section is not None
            if refitted.section.readout is not None:
                apply_readout(planned, refitted.section.readout, refitted.tensors)
                top1_refitted = top1_percent(planned, test, labels)
            rows.append({
                "share": share, "name": row_name, "top1_percent": top1,
                "drop_points": baseline - top1,
                "drop_points_refitted": baseline - top1_refitted,
                "formula_share": trials_share(trials, section),
                "calibration_loss": trials.measure(section).loss, "seconds": seconds,
                "section": section.as_dict(),
                "counted_share": (
                    counted_flops(planned) / counted_flops(bench.model)
                    if row_name == "search" else None
                ),
            })  # fmt: skip
            print(
                f"{name} {share} {row_name}: {baseline - top1:.2f}, refitted "
                f"{baseline - top1_refitted:.2f}",
                flush=True,
            )
    return {
        "model": {"name": name, "weights_sha256": bench.model.weights_sha256},
        "num_test_clips": len(labels), "num_search_clips": trials.num_clips,
        "baseline_top1_percent": baseline, "rows": rows,
    }  # fmt: skip


def _schedules(trials: Trials, share: float) -> list[tuple[str, TokenSection, float | None]]:
    fitter = Fitter(trials.model)
    found: list[tuple[str, TokenSection, float | None]] = []
    constant = {
        attention: section
        for attention in _ATTENTIONS
        if (section := _constant(trials.model, fitter, share, attention)) is not None
    }
    if constant:
        best = min(constant.values(), key=lambda section: trials.measure(section).loss)
        found += [("constant", best, None), ("tome default", constant["proportional"], None)]
    shape: Candidate | None = None
    for name, technique in TECHNIQUES.items():
        if technique.is_control or objection_to(trials.model, name) is not None:
            continue
        candidate = _best_shape(trials, fitter, name, share)
        if candidate is None:
            continue
        if name == "bipartite":
            shape = candidate
        section = fitter.fit(candidate, share)
        assert section is not None
        found.append((name, section, None))
    for name in ("drop", "random"):
        if shape is not None and name in TECHNIQUES:
            section = fitter.fit(shape.with_technique(name, shape.attention), share)
            if section is not None:
                found.append((name, section, None))
    started = time.perf_counter()
    searched = TokenSearch(Trials(trials.model, trials.batches)).at_share(share)
    found.append(("search", searched.section, time.perf_counter() - started))
    return found


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


def trials_share(trials: Trials, section: TokenSection) -> float:
    """Operations of `section` by the formula, as a share."""
    return Fitter(trials.model).share_of(section)


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
    guesses = torch.cat([model(batch).argmax(-1) for batch in batches])
    return 100 * float((guesses == labels).float().mean())


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
