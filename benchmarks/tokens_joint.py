"""Token reduction and precision, together and apart; see `benchmarks/tokens.py`.

Each row is one `vcompress quantize` without an engine: its planned torch module on the test clips.
The schedule is the one at half of the operations that `quality` found, if that is stored, or is
searched; it is decided first, so that activations are calibrated on what is left, as in every run
of the product.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vcompress.benchmarks import zoo
from vcompress.benchmarks.tokens_quality import NUM_CALIBRATION, top1_percent
from vcompress.compress.tokens.decide import trials_on
from vcompress.compress.tokens.search import TokenSearch
from vcompress.compress.tokens.shapes import Fitter
from vcompress.compress.tokens.surgery import apply_reduction
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.pipeline.run import Options
from vcompress.spec.token_section import TokenSection

__all__ = ["measure", "table"]

SHARE = 0.5
TARGETS = ("int8", "nvfp4")
_NUM_CLIPS = 64
_BATCH_SIZE = 50


def measure(
    name: str, stored: dict[str, Any] | None, *, seed: int, num_test: int
) -> dict[str, Any]:
    """Drops of reduction alone, each target alone, and both.

    Args:
        name: of a reference model.
        stored: its entry of `quality`.
        seed: of the draws.
        num_test: clips that are judged, at most as many as there are.
    """
    import tempfile
    from dataclasses import replace

    from vcompress.pipeline.planning import empty_plan, save_plan

    bench = zoo.load(name, Path(), num_calibration=NUM_CALIBRATION, num_test=num_test)
    test = [torch.from_numpy(batch) for batch in bench.test.batches(_BATCH_SIZE)]
    labels = torch.as_tensor(bench.labels)
    calibration = bench.calibration.subset(range(_NUM_CLIPS))
    trials = trials_on(bench.model, bench.calibration, seed)
    section = _searched(stored) or TokenSearch(trials).at_share(SHARE).section
    baseline = top1_percent(bench.model, test, labels)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        schedule = Path(folder) / "tokens.json"
        empty = empty_plan(bench.model, calibration, Options(seed=seed))
        save_plan(replace(empty, tokens=section), {}, schedule)
        for target in (None, *TARGETS):
            for tokens in (None, str(schedule)):
                if target is None and tokens is None:
                    continue
                if target is None:
                    planned = bench.model.copy()
                    apply_reduction(planned, section, trials.fitted(section))
                else:
                    options = Options(target=target, tokens=tokens, seed=seed)
                    plan, tensors = make_plan(bench.model, calibration, options)
                    planned = apply_plan(bench.model, plan, tensors)
                top1 = top1_percent(planned, test, labels)
                rows.append({
                    "target": target, "tokens": tokens is not None, "top1_percent": top1,
                    "drop_points": baseline - top1,
                })  # fmt: skip
                print(name, rows[-1], flush=True)
    return {
        "model": {"name": name, "weights_sha256": bench.model.weights_sha256},
        "num_test_clips": len(labels), "baseline_top1_percent": baseline,
        "flop_share": Fitter(bench.model).share_of(section), "section": section.as_dict(),
        "rows": rows,
    }  # fmt: skip


def _searched(stored: dict[str, Any] | None) -> TokenSection | None:
    for row in stored["rows"] if stored else ():
        if row["name"] == "search" and row["share"] == SHARE:
            return TokenSection.from_dict(row["section"])
    return None


def table(entries: dict[str, Any]) -> str:
    """Points lost, apart and together, in Markdown."""
    lines = [
        "| model (test clips) | tokens alone | target | target alone | both | sum of both alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        drops = {(row["target"], row["tokens"]): row["drop_points"] for row in entry["rows"]}
        alone = drops[None, True]
        lines += [
            f"| {name} ({entry['num_test_clips']:,}) | {alone:.2f} | {target} | "
            f"{drops[target, False]:.2f} | {drops[target, True]:.2f} | "
            f"{alone + drops[target, False]:.2f} |"
            for target in TARGETS
        ]
    return "\n".join(lines)
