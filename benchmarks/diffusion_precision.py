"""Does precision that follows block volatility beat a fixed choice, on the trained transformer?

All linear layers of the blocks are stored in NVFP4. At equal shares of block calls with inputs of
four bits (the others have eight), clips that nothing was fitted to are compared with the full
model's, and with those of the same weights and eight-bit inputs everywhere, which shows what the
inputs alone do. `random` gives the same share to block calls at random.

    python -m vcompress.benchmarks.diffusion_precision
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.compress.dynamic import DynamicSection, apply_dynamic
from vcompress.compress.dynamic.calibrate import (
    Point,
    fit,
    held_weights,
    measure_blocks,
    section_of,
)
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.cache_request import with_calls
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, open_sampler, read_prompts
from vcompress.pipeline.dynamic_search import best_signal, uniform
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.pipeline.run import Options, Silent
from vcompress.spec.dynamic_section import FINE_INPUTS
from vcompress.spec.formats import FLOAT
from vcompress.spec.layer_choice import LayerChoice
from vcompress.validate.frames import Frames, psnr_db

RESULTS = Path(__file__).parent / "results" / "diffusion_precision.json"
SOURCE = "reference:bouncing-garments"
# No layer is given more bits for its error.
_ANY_ERROR = 10.0


@dataclass(frozen=True, kw_only=True)
class RandomSection(DynamicSection):
    """Four bits for `share` of the calls of blocks and steps, by lot."""

    share: float = 0.5
    lot: int = 0

    def takes_four_bits(self, block: str, step: int, signal: float | None) -> bool:
        """By a hash, so that every clip and branch draws the same."""
        drawn = hashlib.sha256(f"{self.lot} {block} {step}".encode()).digest()
        return int.from_bytes(drawn[:4], "big") / 2**32 < self.share


def plan_in_nvfp4(folder: Path, algorithm: str) -> VideoModel:
    """The transformer with all linear layers of its blocks in NVFP4, and the rest as it is."""
    options = Options(target="nvfp4", calib=SOURCE, algorithm=algorithm, max_layer_error=_ANY_ERROR)
    options = with_calls(SOURCE, options, folder / "calls.pt", Silent())
    assert options.calib is not None
    model = load_model(SOURCE, LoadOptions(calls=Path(options.calib)))
    request = ClipRequest(calib=options.calib, data=None, num_clips=64, num_test_clips=None, seed=0)
    calls = open_clip_sets(request, None, ()).calibration
    plan, tensors = make_plan(model, calls, options)
    kept = LayerChoice(format=FLOAT, reason="no layer of a block")
    choices = {
        name: choice if name.startswith(model.blocks) and choice.format == "nvfp4" else kept
        for name, choice in plan.quantize.items()
    }
    used = {name: parts for name, parts in tensors.items() if choices.get(name, kept) is not kept}
    return apply_plan(model, replace(plan, quantize=choices), used)


def sections(
    points: Sequence[Point], num_steps: int, shares: Sequence[float]
) -> Iterator[tuple[str, float, DynamicSection]]:
    """Every rule at every share."""
    blocks = list(dict.fromkeys(point.block for point in points))
    tenth = max(1, round(0.1 * num_steps))
    for share in shares:
        for name, signal, ends in (
            ("added", "added", (0, 0)), ("moved", "moved", (0, 0)), ("blocks", "none", (0, 0)),
            ("added, ends protected", "added", (tenth, tenth)),
            ("blocks, ends protected", "none", (tenth, tenth)),
        ):  # fmt: skip
            yield name, share, _fitted(points, signal, share, num_steps, ends)
        yield "added, turned", share, _turned(_fitted(points, "added", 1 - share, num_steps))
        fine = round((1 - share) * num_steps)
        for name, first in (("first", fine), ("last", 0), ("both ends", fine // 2)):
            ends = (first, fine - first)
            yield (
                f"{name} steps fine", share,
                uniform(blocks, four_bits=True, num_steps=num_steps, protect=ends),
            )  # fmt: skip
        for lot in range(2):
            yield f"random {lot}", share, _random(blocks, num_steps, share, lot)


def _fitted(
    points: Sequence[Point], signal: str, share: float, num_steps: int,
    ends: tuple[int, int] = (0, 0),
) -> DynamicSection:  # fmt: skip
    return section_of(points, signal, share, num_steps=num_steps, fine=FINE_INPUTS[0], protect=ends)  # type: ignore[arg-type]


def _turned(calm: DynamicSection) -> DynamicSection:
    """Four bits for what `calm` does not give them to: a rule that is wrong on purpose."""
    lines = {name: replace(line, alpha=-line.alpha, beta=-line.beta)
             for name, line in calm.blocks.items()}  # fmt: skip
    return replace(calm, blocks=lines, threshold=-calm.threshold)


def _random(blocks: Sequence[str], num_steps: int, share: float, lot: int) -> RandomSection:
    plain = uniform(blocks, four_bits=True, num_steps=num_steps)
    values = {each: getattr(plain, each) for each in plain.__dataclass_fields__}
    return RandomSection(**values, share=share, lot=lot)


def judge(
    sampler: Sampler, section: DynamicSection, cases: Sequence[Case], full: Sequence[Frames],
    fine: Sequence[Frames] | None,
) -> tuple[dict[str, Any], list[Frames]]:  # fmt: skip
    """PSNR of the clips under `section`, and what ran in four bits."""
    with apply_dynamic(sampler.denoisers[0], section) as handle:
        clips = [sampler.sample(case) for case in cases]
        report = handle.counted()
    row: dict[str, Any] = {
        "share": report.share, "linear_share": report.linear_share,
        "mean_bits": report.mean_bits,
        "psnr_db": [psnr_db(a, b) for a, b in zip(full, clips, strict=True)],
    }  # fmt: skip
    row["mean_psnr_db"] = float(np.mean(row["psnr_db"]))
    if fine is not None:
        row["psnr_db_inputs"] = [psnr_db(a, b) for a, b in zip(fine, clips, strict=True)]
        row["mean_psnr_db_inputs"] = float(np.mean(row["psnr_db_inputs"]))
    return row, clips


def main() -> None:
    """Measure every rule and write what was found after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--clips", type=int, default=6, help="held out, and not more to fit to")
    parser.add_argument("--fitted-clips", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.75])
    parser.add_argument("--algorithm", default="auto")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sampler = open_sampler(SOURCE, num_steps=arguments.steps)
    prompts = read_prompts(None, sampler)
    fitted, _ = make_cases(prompts, arguments.fitted_clips, 0)
    _, held_out = make_cases(prompts, arguments.clips, 0)
    full = [sampler.sample(case) for case in held_out]
    with tempfile.TemporaryDirectory() as folder:
        module = plan_in_nvfp4(Path(folder), arguments.algorithm).module
    sampler.pipe.transformer = module
    steps = arguments.steps
    results: dict[str, Any] = {
        "command": "python -m vcompress.benchmarks.diffusion_precision "
        f"--clips {arguments.clips} --fitted-clips {arguments.fitted_clips} "
        f"--steps {arguments.steps} --algorithm {arguments.algorithm} "
        f"--shares {' '.join(map(str, arguments.shares))}",
        "pipeline": sampler.name, "steps": steps, "algorithm": arguments.algorithm,
        "fine": FINE_INPUTS[0], "fitted_clips": [case.name for case in fitted],
        "held_out_clips": [case.name for case in held_out], "rows": [],
    }  # fmt: skip

    def note(rule: str, share: float, row: dict[str, Any]) -> None:
        results["rows"].append({"rule": rule, "asked": share, **row})
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        shown = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
        print(rule, share, json.dumps(shown), flush=True)

    with held_weights(module):
        with measure_blocks(module, num_steps=steps, fine=FINE_INPUTS[0]) as points:
            for case in fitted:
                sampler.sample(case)
        signal, explained = best_signal(points)
        results |= {"signal": signal, "explained": explained, "correlation": {
            name: {block: line.correlation for block, line in fit(points, name).items()}
            for name in ("added", "moved")
        }}  # fmt: skip
        print(signal, explained, json.dumps(results["correlation"]), flush=True)
        blocks = list(dict.fromkeys(point.block for point in points))
        all_fine = uniform(blocks, four_bits=False, num_steps=steps)
        row, fine = judge(sampler, all_fine, held_out, full, None)
        note("eight bits everywhere", 0.0, row)
        row, _ = judge(sampler, uniform(blocks, four_bits=True, num_steps=steps), held_out, full,
                       fine)  # fmt: skip
        note("four bits everywhere", 1.0, row)
        for rule, share, section in sections(points, steps, arguments.shares):
            note(rule, share, judge(sampler, section, held_out, full, fine)[0])


if __name__ == "__main__":
    main()
