"""Precision and cache on real kernels: whole generations of the trained transformer in a runtime.

    vcompress quantize reference:bouncing-garments --calib reference:bouncing-garments \
        --target int8 --cache auto --min-psnr 30 --output out-int8
    python -m vcompress.benchmarks.diffusion_runtime out-int8 --docs docs/caching.md

Four arms take turns on every clip: the unquantized graph and that of the artifact, each computing
every step, and each with the artifact's cache. All four are the `WanPipeline` of diffusers, with a
module whose calls run in the runtime, as `compressed(..., runtime=...)` gives it; with guidance, so
two calls a step. Seconds are those of the whole generation, sampler included; a speed-up is the
median over clips and rounds of the float graph's seconds, mean of before and after, over the arm's.
Prompts are held-out ones, seeds are such that nothing was calibrated on; PSNR is against the float
graph with every step computed. The arm `torch` is the pipeline as it is, and what `speed_up` would
be against that stands beside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

import vcompress
from vcompress.benchmarks.diffusion_table import put
from vcompress.compress.cache import CacheSection, apply_cache
from vcompress.export.deployed import RUNTIMES, Session, open_graph
from vcompress.export.graph import export_onnx
from vcompress.export.openvino_runtime import open_openvino
from vcompress.export.runtime import open_session
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
_BASELINE = "float32"


@dataclass
class Arm:
    """One way to generate.

    Attributes:
        module: of the pipeline.
        cache: what is put around it for a run.
        seconds: of each run; `speed_ups` and qualities of each clip.
    """

    name: str
    module: torch.nn.Module
    cache: CacheSection | None = None
    seconds: list[float] = field(default_factory=list)
    speed_ups: list[float] = field(default_factory=list)
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
            "mean_psnr_db": mean(self.psnr), "worst_psnr_db": min(self.psnr),
            "mean_ssim": mean(self.ssim), "psnr_db": self.psnr, "ssim": self.ssim,
        }  # fmt: skip


def float_graph(calls: Path, runtime: str, folder: Path, threads: int) -> Session:
    """The unquantized transformer, exported for the size of the recorded calls."""
    model = load_model("reference:bouncing-garments", LoadOptions(calls=calls))
    example, path = model.example(), folder / "float.onnx"
    export_onnx(PrimaryOutput(model.module, example), example, path, dialect="portable")
    opened: Session = {"onnxruntime": open_session, "openvino": open_openvino}[runtime](
        path, threads=threads
    )
    return opened


@contextmanager
def _arms(artifact: Artifact, calls: Path, runtime: str, threads: int) -> Iterator[list[Arm]]:
    config, plan = artifact.file("config"), artifact.file("plan")
    assert config is not None
    assert plan is not None
    cache = read_plan(plan)[0].cache
    if cache is None:
        message = f"{artifact.path} has no cache; quantize with --cache auto --min-psnr 30"
        raise SystemExit(message)
    configuration = strict_json.read(config)
    formats = artifact.manifest["precision"]["layers"]
    name = max(formats, key=lambda each: int(formats[each]))
    with tempfile.TemporaryDirectory() as folder:
        plain = graph_module(configuration, float_graph(calls, runtime, Path(folder), threads))
        small = graph_module(configuration, open_graph(artifact, runtime, threads=threads))
        yield [
            Arm(_BASELINE, plain), Arm(f"{name}: precision alone", small),
            Arm("cache alone", plain, cache), Arm(f"{name} and cache", small, cache),
        ]  # fmt: skip


def judge(arms: list[Arm], sampler: Sampler, cases: list[Case], rounds: int) -> None:
    """Every arm on every case between two runs of the first, which is the measure of all."""
    baseline, *others = arms
    for number, case in enumerate(cases, 1):
        full, before = baseline.sample(sampler, case)
        for turn in range(rounds):
            for arm in others:
                clip, own = arm.sample(sampler, case)
                again, after = baseline.sample(sampler, case)
                arm.seconds.append(own)
                arm.speed_ups.append((before + after) / 2 / own)
                baseline.seconds.append(after)
                before = after
                if turn == 0:
                    arm.psnr.append(psnr_db(full, clip))
                    arm.ssim.append(ssim(full, clip))
                    baseline.psnr.append(psnr_db(full, again))
                    baseline.ssim.append(ssim(full, again))
        print(f"{number} of {len(cases)}: " + ", ".join(
            f"{arm.name} {arm.psnr[-1]:.1f} dB {median(arm.speed_ups):.2f}x" for arm in others
        ), flush=True)  # fmt: skip
    baseline.speed_ups = [1.0] * len(baseline.seconds)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| runtime | generation | seconds | speed-up | PSNR dB | worst clip | SSIM |",
        "|---|---|---|---|---|---|---|",
    ]
    for runtime, found in results["runtimes"].items():
        for arm in found["arms"]:
            exact = arm["name"] == _BASELINE
            quality = ("", "", "") if exact else (
                f"{arm['mean_psnr_db']:.1f}", f"{arm['worst_psnr_db']:.1f}",
                f"{arm['mean_ssim']:.4f}",
            )  # fmt: skip
            speed = "1" if exact else f"{arm['speed_up']:.2f}x"
            lines.append(
                f"| {runtime} | {arm['name']} | {arm['seconds']:.2f} | {speed} | "
                + " | ".join(quality) + " |"
            )  # fmt: skip
    head = (
        f"{results['num_steps']} steps with guidance, {results['num_clips']} held-out clips in "
        f"{results['rounds']} rounds, {results['threads']} thread, "
        f"{results['device']['cpu']}; {len(results['compute_steps'])} steps are computed with the "
        f"cache. torch itself takes {results['torch_seconds']:.2f} s for the full generation."
    )
    return f"{head}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--calls", type=Path, help="recorded; default: beside the artifact")
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=list(RUNTIMES))
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="a page between whose marks the table goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    artifact = Artifact.open(arguments.artifact)
    calls = arguments.calls or arguments.artifact.with_suffix(".calls.pt")
    sampler = open_sampler("reference:bouncing-garments")
    _, cases = make_cases(read_prompts(None, sampler), arguments.clips, _FIRST_SEED)
    own = Arm("torch", sampler.pipe.transformer)
    torch_seconds = median(own.sample(sampler, case)[1] for case in cases[:3])
    results: dict[str, Any] = {
        "vcompress": vcompress.__version__, "pipeline": sampler.name,
        "num_steps": sampler.num_steps, "num_clips": len(cases), "rounds": arguments.rounds,
        "threads": arguments.threads, "device": describe_device(arguments.threads),
        "held_out": [case.name for case in cases], "torch_seconds": torch_seconds, "runtimes": {},
    }  # fmt: skip
    for runtime in arguments.runtimes:
        with _arms(artifact, calls, runtime, arguments.threads) as arms:
            results["compute_steps"] = list(arms[-1].cache.compute_steps or ())
            judge(arms, sampler, cases, arguments.rounds)
            results["runtimes"][runtime] = {"arms": [arm.as_dict() for arm in arms]}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.docs is not None:
        put(table(results), arguments.docs, name="diffusion runtime")


if __name__ == "__main__":
    main()
