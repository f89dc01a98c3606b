"""A shipped recogniser as a user might have it, as an ONNX file or a program: for docs/export.md.

    python benchmarks/graph_models.py write penvideo20.onnx
    python benchmarks/graph_models.py write penvideo20.pt2
    vcompress quantize penvideo20.onnx --target int8 --calib reference:penvideo20 -o a/
    python benchmarks/graph_models.py collect a/ b/ ...

`write` makes the float32 file: in ONNX with clip, task and labels in the metadata, as a program
without, so that quantizing it needs `--trust-pickle --std 0.1`. `collect` puts what the artifacts
report into results/graph_models.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vcompress.export.graph import export_onnx
from vcompress.models.load import load_model
from vcompress.models.video import PrimaryOutput

__all__ = ["collect", "write"]

_RESULTS = Path(__file__).parent / "results" / "graph_models.json"


def write(path: Path, name: str = "penvideo20") -> None:
    """Write `reference:name` to `path`."""
    model = load_model(f"reference:{name}")
    module = PrimaryOutput(model.module).eval()
    clips = model.example(2)
    assert isinstance(clips, torch.Tensor)
    if path.suffix == ".pt2":
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(module, (clips,), dynamic_shapes=shapes), path)
        return
    facts = {
        "name": model.name, "task": model.task, "clip": model.clip.as_dict(),
        "labels": list(model.labels),
    }  # fmt: skip
    export_onnx(module, clips, path, dialect="portable", metadata={"vcompress": json.dumps(facts)})


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    """One row an artifact."""
    rows = []
    for folder in folders:
        report = json.loads((folder / "report.json").read_text())
        stages = {stage["name"]: stage for stage in report["stages"]}
        first = report["stages"][0]["metrics"]
        last = stages[report["result_stage"]]["metrics"]
        plan = json.loads((folder / "plan.json").read_text())
        rows.append({
            "command": report["command"], "family": report["model"]["family"],
            "target": report["target"], "num_clips": report["verdict"]["num_clips"],
            "baseline_top1_percent": first["top1_percent"], "top1_percent": last["top1_percent"],
            "sqnr_db": last["sqnr_db"], "verdict": report["verdict"]["outcome"],
            "formats": Counter(line["format"] for line in plan["quantize"].values()),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "write":
        write(Path(paths[0]))
    else:
        _RESULTS.write_text(json.dumps(collect([Path(path) for path in paths]), indent=1) + "\n")
