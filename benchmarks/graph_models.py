"""The float32 ONNX file of a shipped recogniser, as a user might have it: for docs/export.md.

python benchmarks/graph_models.py penvideo20.onnx [penvideo20]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vcompress.export.graph import export_onnx
from vcompress.models.load import load_model
from vcompress.models.video import PrimaryOutput

__all__ = ["main"]


def main(path: str, name: str = "penvideo20") -> None:
    """Write `reference:name` to `path`, with its clip, task and labels in the metadata."""
    model = load_model(f"reference:{name}")
    facts = {
        "name": model.name, "task": model.task, "clip": model.clip.as_dict(),
        "labels": list(model.labels),
    }  # fmt: skip
    export_onnx(
        PrimaryOutput(model.module).eval(), model.example(2), Path(path), dialect="portable",
        metadata={"vcompress": json.dumps(facts)},
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
