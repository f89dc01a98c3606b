"""How far do two correct computations of one quantized model differ? Torch against itself.

    python benchmarks/ties.py ARTIFACT [--clips 600]

ARTIFACT is what `vcompress quantize reference:moving-fashion --target nvfp4 -o ARTIFACT` made. Its
planned module is run twice on the same test clips, with torch's fused attention and with the
one that is written out; nothing else differs. Beside it the same for the float model. This is the
least that any other runtime can be expected to differ by. `benchmarks/results/ties.json` keeps it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vcompress.calib.clips import Clips
from vcompress.calib.sources import ClipRequest, open_clip_sets
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.planning import apply_plan, read_plan

RESULTS = Path(__file__).parent / "results" / "ties.json"


def compare(model: VideoModel, clips: Clips) -> dict[str, Any]:
    """Outputs with fused attention against outputs with attention written out."""
    with torch.no_grad():
        fused = torch.cat([model(batch) for batch in clips.tensors(16)])
        with sdpa_kernel(SDPBackend.MATH):
            written_out = torch.cat([model(batch) for batch in clips.tensors(16)])
    difference = (fused - written_out).norm(dim=1) / fused.norm(dim=1)
    differing = int((fused.argmax(1) != written_out.argmax(1)).sum())
    return {
        "num_clips": len(fused),
        "num_other_top_class": differing,
        "agreement_percent": 100 * (1 - differing / len(fused)),
        "relative_l2_median": float(difference.median()),
        "relative_l2_max": float(difference.max()),
    }


def main() -> None:
    """Parse the command line, measure, keep and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clips", type=int, default=600)
    arguments = parser.parse_args()
    plan, tensors = read_plan(arguments.artifact / "plan.json")
    source = plan.evidence["calib"]
    model = load_model(source)
    request = ClipRequest(
        calib=source, data=None, num_clips=1, num_test_clips=arguments.clips, seed=plan.seed
    )
    test = open_clip_sets(request, model.clip, model.labels).test
    found = {
        "model": model.name, "target": plan.target, "torch": torch.__version__,
        "float": compare(model, test),
        "planned": compare(apply_plan(model, plan, tensors), test),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
