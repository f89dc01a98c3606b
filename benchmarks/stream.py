"""Streams: equality and speed of kept features, proof of repeated answers, and memory.

    python benchmarks/stream.py [SECTION ...] --data FOLDER [--threads 1]

FOLDER holds real videos, at any depth; the smallest file of at least 100 frames is streamed.
- exact: factorised encoders of 12 + 4 layers at window 16. Windows of the video are computed both
  ways and compared bit for bit; then both ways are timed in turn.
- approximate: the reference model penvideo20, a joint VideoMAE, on streams of strokes and pauses.
  The gate is found on some streams, proved on others, and judged here on a third set.
- memory: resident set while 10,000 frames of the video, looped, go through a stream.
`benchmarks/results/stream.json` keeps the last run of each section.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vcompress
from vcompress.benchmarks.stream_models import (
    factorised_vivit,
    pen_stream,
    tower_with_head,
    videoprism,
)
from vcompress.calib.folder import find_videos
from vcompress.calib.live import TimedFrame, live_frames
from vcompress.compress.stream.windows import Recomputing
from vcompress.models.load import load_model
from vcompress.models.video import VideoModel
from vcompress.pipeline.run import Silent
from vcompress.pipeline.stream import stream
from vcompress.pipeline.stream_reuse import choose_reuse
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError
from vcompress.validate.latency import describe_device, measure_interleaved

RESULTS = Path(__file__).parent / "results" / "stream.json"
WINDOW, STRIDE = 16, 2
MODELS: dict[str, Callable[[], VideoModel]] = {
    "ViViT factorised (model 2)": factorised_vivit,
    "ViViT factorised, tubelets of 2": lambda: factorised_vivit(tubelet=2),
    "DINOv2 tower, temporal head": tower_with_head,
    "VideoPrism": videoprism,
}
_NUM_COMPARED = 8
_NUM_LOOPED, _LOOPED_STRIDE, _EVERY = 10_000, 4, 500


def exact(video: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Equality on the video, then wall clock, model by model; `keep` is told after each."""
    rows: list[dict[str, Any]] = []
    cases = [(name, STRIDE) for name in MODELS]
    for name, stride in cases + [(next(iter(MODELS)), other) for other in (1, 4, 8)]:
        row = {"model": name, "window": WINDOW, "stride": stride}
        row |= _measured(MODELS[name](), video, stride, rounds)
        rows.append(row)
        print(row, flush=True)
        keep({"video": video.name, "rows": rows})


def _measured(model: VideoModel, video: Path, stride: int, rounds: int) -> dict[str, Any]:
    """Preparing and running windows, both ways on the same frames: compared, then in turn timed."""
    chosen = choose_reuse(
        model, model.clip, stride=stride, reuse="exact", calib=None, min_agreement=1,
        progress=Silent(),
    )  # fmt: skip
    frames = np.stack([frame for _, frame in islice(live_frames(video, model.clip), 64)])
    anew = Recomputing(model, model.clip)
    anew.push(frames[:WINDOW])
    chosen.answering.step(frames[:WINDOW])
    starts = cycle(range(WINDOW, len(frames) - stride, stride))
    num_equal = 0
    for start in islice(starts, _NUM_COMPARED):
        new = frames[start : start + stride]
        num_equal += torch.equal(chosen.answering.step(new).output, anew.step(new).output)

    def step() -> object:
        start = next(starts)
        return chosen.answering.step(frames[start : start + stride])

    timed = measure_interleaved({"anew": anew.answer, "reuse": step}, warm_up=1, rounds=rounds)
    speed, reuse = timed["reuse"].speed, chosen.reuse
    assert speed is not None
    return {
        "reuse": reuse.kind, "cut_behind": reuse.module, "frames_at_a_time": reuse.chunk,
        "num_compared": _NUM_COMPARED, "num_equal_bits": num_equal,
        "difference": reuse.difference, "operations_share": reuse.operations,
        "anew_ms": timed["anew"].p50_ms, "reuse_ms": timed["reuse"].p50_ms,
        "speed_up": speed.median, "speed_up_lower": speed.lower, "speed_up_upper": speed.upper,
        "num_rounds": speed.num_rounds,
    }  # fmt: skip


def approximate(num_videos: int = 8) -> dict[str, Any]:
    """Find and prove a gate, then count on streams that had no part in it."""
    model = load_model("reference:penvideo20")
    totals = {"windows": 0, "repeated": 0, "agreed": 0}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        calib, others = Path(folder) / "calib", Path(folder) / "others"
        for place, part in ((calib, "calibration"), (others, "test")):
            place.mkdir()
            for seed in range(num_videos):
                pen_stream(place / f"{seed:02d}.mkv", part=part, seed=seed)
        reuse = None
        for path in sorted(others.iterdir()):
            if reuse is None:
                windows = stream(model, path, stride=STRIDE, calib=str(calib))
                reuse = windows.reuse
                if reuse.gate is None:
                    return {"model": model.name, "reuse": reuse.as_dict()}
            else:
                windows = stream(model, path, stride=STRIDE, gate=reuse.gate)
            answers = list(windows)
            anew = list(stream(model, path, stride=STRIDE, reuse="none"))
            totals["windows"] += len(answers)
            totals["repeated"] += windows.summary.num_repeated
            totals["agreed"] += sum(
                one.label == other.label for one, other in zip(answers, anew, strict=True)
            )
            ratios.append(windows.summary.speed_up)
    assert reuse is not None
    row = {
        "model": model.name, "window": WINDOW, "stride": STRIDE, "reuse": reuse.as_dict(),
        "num_videos": num_videos, "num_windows": totals["windows"],
        "repeated_share": totals["repeated"] / totals["windows"],
        "agreement": totals["agreed"] / totals["windows"],
        "speed_up_by_video": sorted(ratios),
    }  # fmt: skip
    print(row, flush=True)
    return row


def memory(video: Path) -> dict[str, Any]:
    """Resident set over a looped video: a stream has no length that it could know."""
    model = factorised_vivit(width=64, size=64, spatial=2, temporal=1)

    def looped() -> Iterator[TimedFrame]:
        count = 0
        while True:
            for _, frame in live_frames(video, model.clip):
                yield count / 25, frame
                count += 1

    windows = stream(model, islice(looped(), _NUM_LOOPED), stride=_LOOPED_STRIDE)
    rows: list[dict[str, float]] = []
    for window in windows:
        num_frames = WINDOW + window.index * _LOOPED_STRIDE
        if num_frames % _EVERY == 0:
            rows.append({"num_frames": num_frames, "resident_mib": _resident_mib()})
            print(rows[-1], flush=True)
    late = [row["resident_mib"] for row in rows[len(rows) // 4 :]]
    return {
        "video": video.name, "reuse": windows.reuse.kind, "num_frames": windows.summary.num_frames,
        "num_windows": windows.summary.num_windows, "rows": rows,
        "growth_mib_after_first_quarter": late[-1] - late[0],
        "spread_mib_after_first_quarter": max(late) - min(late),
    }  # fmt: skip


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)


def _long_enough(folder: Path) -> Path:
    clip = ClipSpec(num_frames=WINDOW, height=16, width=16)
    names = find_videos(folder).videos
    for name in sorted(names, key=lambda name: (folder / name).stat().st_size):
        try:
            if len(list(islice(live_frames(folder / name, clip), 100))) == 100:
                return folder / name
        except InputError:
            continue
    message = f"{folder} must hold a video of at least 100 frames; give another --data"
    raise InputError(message)


def main() -> None:
    """Measure what was asked for and keep the rest."""
    sections = ("exact", "approximate", "memory")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(sections)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {sections}")
    torch.set_num_threads(arguments.threads)
    video = _long_enough(arguments.data)
    for section in arguments.sections or sections:

        def keep(measured: dict[str, Any], section: str = section) -> None:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[section] = _circumstances(section, arguments) | measured
            RESULTS.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")

        if section == "exact":
            exact(video, arguments.rounds, keep)
        elif section == "approximate":
            keep(approximate())
        else:
            keep(memory(video))


def _circumstances(section: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/stream.py {section} --data FOLDER --threads "
        f"{arguments.threads} --rounds {arguments.rounds}",
        "device": describe_device(arguments.threads),
        "versions": {"vcompress": vcompress.__version__}
        | {name: version(name) for name in ("torch", "transformers", "av", "numpy")},
    }


if __name__ == "__main__":
    main()
