"""Precision and cache on real kernels: whole generations of the trained transformer in a runtime.

    vcompress cache reference:bouncing-garments --min-psnr 30 --output cache.json
    vcompress quantize reference:bouncing-garments --calib reference:bouncing-garments \
        --target int8 --max-layer-error 0.005 --cache cache.json --output out-int8
    python -m vcompress.benchmarks.diffusion_runtime out-int8 --runtimes onnxruntime

Several artifacts can be given; the cache is that of the first, or those of the plans
`--cache`. The arms
take turns on every clip, the unquantized graph with every step computed before and after them: that
graph with the cache, the graph of each artifact without and with it, and torch. All are the
`WanPipeline` of diffusers, with a module whose calls run in the runtime, as `compressed(...,
runtime=...)` gives it; with guidance, so two calls a step. Seconds are those of the whole
generation, sampler included; a speed-up is the median over clips and rounds of the float graph's
seconds, mean of before and after, over the arm's; the second one is of torch's seconds. Prompts are
held-out ones, seeds are such that nothing was calibrated on; PSNR is against the float graph with
every step computed. What a results file says of other runtimes stays in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import vcompress
from vcompress.benchmarks.diffusion_table import put
from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.export.graph import export_onnx
from vcompress.export.openvino_runtime import open_openvino
from vcompress.export.runtime import open_session
from vcompress.export.sessions import RUNTIMES, Session, open_graph
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import PrimaryOutput
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, open_sampler, read_prompts
from vcompress.pipeline.graph_module import graph_module
from vcompress.pipeline.planning import read_plan
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact
from vcompress.validate.frames import Frames, psnr_db, ssim
from vcompress.validate.latency import describe_device

RESULTS = Path(__file__).parent / "results" / "diffusion_runtime.json"
# Far from those of the calibration and of the search.
_FIRST_SEED = 5000
_BASELINE, _TORCH = "float graph", "torch"


@dataclass
class Arm:
    """One way to generate.

    Attributes:
        module: of the pipeline.
        cache: what is put around it for a run.
        seconds: of each run; `speed_ups` (over the float graph, over torch) likewise, qualities of
            each clip.
    """

    name: str
    module: torch.nn.Module
    cache: CacheSection | None = None
    seconds: list[float] = field(default_factory=list)
    speed_ups: list[float] = field(default_factory=list)
    over_torch: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def sample(self, sampler: Sampler, case: Case) -> tuple[Frames, float]:
        """The clip, and the seconds that it took."""
        sampler.pipe.transformer = self.module
        with self._cached(sampler):
            started = time.perf_counter()
            clip = sampler.sample(case)
            return clip, time.perf_counter() - started

    def _cached(self, sampler: Sampler) -> AbstractContextManager[Any]:
        if self.cache is None:
            return nullcontext()
        return apply_cache(self.module, self.cache, scheduler=sampler.pipe.scheduler)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name, "seconds": median(self.seconds), "speed_up": median(self.speed_ups),
            "speed_up_quartiles": [float(x) for x in np.percentile(self.speed_ups, (25, 75))],
            "speed_up_over_torch": median(self.over_torch),
            "mean_psnr_db": mean(self.psnr), "worst_psnr_db": min(self.psnr),
            "mean_ssim": mean(self.ssim), "psnr_db": self.psnr, "ssim": self.ssim,
        }  # fmt: skip


def float_graph(calls: Path, runtime: str, path: Path, threads: int) -> Session:
    """The unquantized transformer, exported to `path` for the size of the recorded calls."""
    if not path.exists():
        model = load_model("reference:bouncing-garments", LoadOptions(calls=calls))
        example = model.example()
        export_onnx(PrimaryOutput(model.module, example), example, path, dialect="portable")
    opened: Session = {"onnxruntime": open_session, "openvino": open_openvino}[runtime](
        path, threads=threads
    )
    return opened


def cache_of(plan: Path | None) -> CacheSection:
    """What `plan` reuses."""
    cache = None if plan is None else read_plan(plan)[0].cache
    if cache is None:
        message = f"{plan} has no cache; quantize with --cache"
        raise SystemExit(message)
    return cache


def open_arms(
    artifacts: list[Artifact], caches: list[CacheSection], plain: Session, own: torch.nn.Module,
    runtime: str, threads: int,
) -> list[Arm]:  # fmt: skip
    """The float graph first, torch last."""
    config = artifacts[0].file("config")
    assert config is not None
    configuration = strict_json.read(config)
    unquantized = graph_module(configuration, plain)
    arms = [Arm(_BASELINE, unquantized)]
    arms += [Arm(f"{cache.policy} alone", unquantized, cache) for cache in caches]
    for artifact in artifacts:
        layers = artifact.manifest["precision"]["layers"]
        total = sum(layers.values())
        name = artifact.manifest["precision"]["target"]
        name = f"{name} ({total - layers.get('keep', 0)} of {total} layers)"
        small = graph_module(configuration, open_graph(artifact, runtime, threads=threads))
        arms.append(Arm(f"{name} alone", small))
        arms += [Arm(f"{name} and {cache.policy}", small, cache) for cache in caches]
    return [*arms, Arm(_TORCH, own)]


def judge(arms: list[Arm], sampler: Sampler, cases: list[Case], rounds: int) -> None:
    """Every arm on every case between two runs of the first, which is the measure of all."""
    baseline, *others = arms
    for number, case in enumerate(cases, 1):
        full, before = baseline.sample(sampler, case)
        for turn in range(rounds):
            clips, seconds = zip(*(arm.sample(sampler, case) for arm in others), strict=True)
            again, after = baseline.sample(sampler, case)
            between = (before + after) / 2
            for arm, clip, own in zip(arms, (again, *clips), (between, *seconds), strict=True):
                arm.seconds.append(own)
                arm.speed_ups.append(between / own)
                arm.over_torch.append(seconds[-1] / own)
                if turn == 0:
                    arm.psnr.append(psnr_db(full, clip))
                    arm.ssim.append(ssim(full, clip))
            before = after
        print(f"{number} of {len(cases)}: " + ", ".join(
            f"{arm.name} {arm.psnr[-1]:.1f} dB {median(arm.speed_ups):.2f}x" for arm in others
        ), flush=True)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| runtime | generation | seconds | speed-up (quartiles) | over torch | PSNR dB | worst "
        "clip | SSIM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for runtime, found in results["runtimes"].items():
        for arm in found["arms"]:
            low, high = arm["speed_up_quartiles"]
            lines.append(
                f"| {runtime} | {arm['name']} | {arm['seconds']:.2f} | {arm['speed_up']:.2f} "
                f"({low:.2f} to {high:.2f}) | {arm['speed_up_over_torch']:.2f} | "
                f"{arm['mean_psnr_db']:.1f} | {arm['worst_psnr_db']:.1f} | {arm['mean_ssim']:.4f} |"
            )
    head = (
        f"{results['num_steps']} steps with guidance, {results['num_clips']} held-out clips in "
        f"{results['rounds']} rounds, {results['threads']} thread, "
        f"{results['device']['cpu']}."
    )
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--calls", type=Path, help="recorded; default: beside the first artifact")
    parser.add_argument(
        "--cache", type=Path, action="append", help="default: that of the first artifact"
    )
    parser.add_argument("--float-graph", type=Path, help="kept there; default: made for this run")
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=list(RUNTIMES))
    parser.add_argument("--steps", type=int, help="of a run; by default what the pipeline takes")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="a page between whose marks the table goes")
    arguments = parser.parse_args()
    threads = arguments.threads
    torch.set_num_threads(threads)
    artifacts = [Artifact.open(path) for path in arguments.artifacts]
    calls = arguments.calls or arguments.artifacts[0].with_suffix(".calls.pt")
    sampler = open_sampler("reference:bouncing-garments", num_steps=arguments.steps)
    _, cases = make_cases(read_prompts(None, sampler), arguments.clips, _FIRST_SEED)
    own, caches = (
        sampler.pipe.transformer,
        [cache_of(plan) for plan in arguments.cache or [artifacts[0].file("plan")]],
    )
    results: dict[str, Any] = {
        "vcompress": vcompress.__version__, "pipeline": sampler.name,
        "num_steps": sampler.num_steps, "num_clips": len(cases), "rounds": arguments.rounds,
        "threads": threads, "held_out": [case.name for case in cases],
        "caches": [cache.as_dict() for cache in caches],
    }  # fmt: skip
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    is_same = all(known.get(name) == value for name, value in results.items())
    results |= {
        "device": describe_device(threads), "runtimes": known["runtimes"] if is_same else {}
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.float_graph or Path(folder) / "float.onnx"
        for runtime in arguments.runtimes:
            plain = float_graph(calls, runtime, path, threads)
            arms = open_arms(artifacts, caches, plain, own, runtime, threads)
            judge(arms, sampler, cases, arguments.rounds)
            results["runtimes"][runtime] = {"arms": [arm.as_dict() for arm in arms]}
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.docs is not None:
        put(table(results), arguments.docs, name="diffusion runtime")


if __name__ == "__main__":
    main()
