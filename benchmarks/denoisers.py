"""Every known class of video diffusion transformers through the whole chain, in tiny sizes.

    python -m vcompress.benchmarks.denoisers --output benchmarks/results/denoisers.json

For each class: recorded calls, `quantize --target nvfp4` with an SM120 engine, parity of the files
with the modules, and the compressed module, with a cache, in the pipeline that diffusers has for it
(Wan in two of them: 2.1 and the two transformers of 2.2). What fails is written down with its
reason.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import vcompress
from vcompress.benchmarks.denoiser_pipelines import PIPELINES, STEPS, open_pipeline
from vcompress.benchmarks.denoiser_zoo import CONFIGS, arguments_of, build, record
from vcompress.calib.calls import load_calls
from vcompress.compress.frozen import FrozenLayer
from vcompress.pipeline import Options, quantize
from vcompress.pipeline.cache import cached
from vcompress.pipeline.compressed import compressed
from vcompress.pipeline.planning import save_plan
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import VcompressError
from vcompress.spec.plan import CompressionPlan

_MAX_LAYER_ERROR = 0.2


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The chain for the class `name`, in `folder`."""
    module = build(name)
    module.save_pretrained(folder / "model")  # type: ignore[operator]
    calls = record(name, module, folder / "calls.pt")
    plan = CompressionPlan(
        target="mixed", seed=0, model={"name": name, "task": "denoise"}, quantize={}, evidence={},
        cache=CacheSection(policy="taylorseer", interval=3, num_steps=STEPS),
    )  # fmt: skip
    save_plan(plan, {}, folder / "cache.json")
    options = Options(
        target="nvfp4", calib=str(calls), output=folder / "out", max_layer_error=_MAX_LAYER_ERROR,
        cache=str(folder / "cache.json"),
    )  # fmt: skip
    outcome = quantize(str(folder / "model"), options=options)
    stages = {stage["name"]: stage for stage in outcome.report["stages"]}
    restored = compressed(outcome.path)
    frozen = [each for each in restored.modules() if isinstance(each, FrozenLayer)]
    arguments = arguments_of(name, 5, 600.0)
    (sample,) = load_calls(calls)[:1].tensors(1)
    manifest = json.loads((outcome.path / "manifest.json").read_text(encoding="utf-8"))
    with torch.inference_mode():
        before = module(**arguments, return_dict=False)[0]
        after = restored(**arguments, return_dict=False)[0]
    return {
        "inputs": str(sample.spec),
        "formats": manifest["precision"]["layers"],
        "effective_bits": outcome.report["precision"]["result_effective_bits"],
        "batch_is_free": manifest["inputs"][0]["shape"][0] == "batch",
        "parity_unquantized": stages["baseline ONNX"]["parity"],
        "parity_quantized": stages["portable ONNX"]["parity"],
        "sqnr_db_of_held_out_calls": outcome.verdict.sqnr_db
        or stages["portable ONNX"]["metrics"]["sqnr_db"],
        "engines": [
            {key: engine[key] for key in ("runtime", "sm", "status", "bytes", "reason")}
            for engine in outcome.report["engines"]
        ],
        "compressed_module": {
            "num_frozen_layers": len(frozen),
            "relative_l2_to_original": float((after - before).norm() / before.norm()),
        },
        "pipelines": {
            family: in_pipeline(family, outcome.path)
            for family, (kind, _) in PIPELINES.items()
            if kind == name
        },
    }


def in_pipeline(family: str, artifact: Path) -> dict[str, Any]:
    """A request to the pipeline of `family` with `artifact` in the place of its denoisers."""
    run = open_pipeline(family)
    original = run()
    for name in ("transformer", "transformer_2"):
        if getattr(run.pipe, name, None) is not None:
            setattr(run.pipe, name, compressed(artifact))
    with cached(run.pipe, artifact) as handle:
        clip = run()
        report = handle.report()
        is_repeatable = torch.equal(run(), clip)
    return {
        "class": type(run.pipe).__name__, "skip_rate": report.skip_rate,
        "relative_l2_to_original": float((clip - original).norm() / original.norm()),
        "is_repeatable": is_repeatable,
    }  # fmt: skip


def main() -> None:
    """Measure all classes and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("names", nargs="*", default=list(CONFIGS))
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    import diffusers

    results: dict[str, Any] = {}
    for name in wanted.names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = measure(name, Path(folder))
            except VcompressError as error:
                results[name] = {"error": str(error)}
        print(name, json.dumps(results[name])[:400], flush=True)
    facts = {
        "vcompress": vcompress.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "max_layer_error": _MAX_LAYER_ERROR,
        "classes": results,
    }
    wanted.output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
