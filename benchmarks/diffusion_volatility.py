"""How well block volatility predicts the error of NVFP4, layer by layer: on a DiT and random Wan.

python -m vcompress.benchmarks.diffusion_volatility [FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vcompress.benchmarks.denoiser_zoo import build
from vcompress.benchmarks.layer_volatility import fit_lines, measure
from vcompress.compress.cache.stack import find_stack
from vcompress.compress.dynamic.lines import Line
from vcompress.pipeline.cache_sampler import Case, Sampler, make_cases, open_sampler, read_prompts

RESULTS = Path(__file__).parent / "results" / "diffusion_volatility.json"


def lines_of(sampler: Sampler, cases: list[Case]) -> Mapping[str, Line]:
    """The line of every layer over `cases`, guided branch only."""
    found = []
    module = sampler.denoisers[0]
    for case in cases:
        with measure(module, find_stack(module, ()), every_nth_call=2) as measured:
            sampler.sample(case)
        found.append(measured)
    return fit_lines(found)


def random_wan(num_steps: int) -> tuple[Sampler, list[Case]]:
    """A tiny Wan pipeline whose weights are random."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
        transformer=build("WanTransformer3DModel"),
    )  # fmt: skip
    call = {"num_frames": 9, "height": 64, "width": 64, "guidance_scale": 2.0}
    names = ("prompt_embeds", "negative_prompt_embeds")
    cases = [Case({name: torch.randn(1, 8, 32) for name in names}, seed) for seed in range(2)]
    return Sampler(pipe, name="random Wan", num_steps=num_steps, call=call), cases


def main() -> None:
    """Measure both and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="reference:bouncing-garments")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    trained = open_sampler(arguments.folder, num_steps=arguments.steps)
    cases, _ = make_cases(read_prompts(None, trained), arguments.clips, 0)
    results: dict[str, Any] = {
        "command": "python -m vcompress.benchmarks.diffusion_volatility "
        f"--clips {arguments.clips} --steps {arguments.steps}"
    }
    for name, sampler, own in (
        ("random Wan", *random_wan(arguments.steps)), (trained.name, trained, cases),
    ):  # fmt: skip
        lines = lines_of(sampler, own)
        correlations = np.array([line.correlation for line in lines.values()])
        known = correlations[np.isfinite(correlations)]
        results[name] = {
            "num_layers": len(lines), "undefined": len(lines) - len(known),
            "median": float(np.median(known)),
            "quartiles": [float(value) for value in np.quantile(known, [0.25, 0.75])],
            "negative": int((known < 0).sum()), "above_0.8": int((known > 0.8).sum()),
            "layers": {
                layer: {
                    "alpha": line.alpha, "beta": line.beta,
                    "correlation": line.correlation if np.isfinite(line.correlation) else None,
                }
                for layer, line in lines.items()
            },
        }  # fmt: skip
        summary = {key: value for key, value in results[name].items() if key != "layers"}
        print(name, json.dumps(summary), flush=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
