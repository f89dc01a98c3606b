"""What a user has: a checkpoint file and a folder of videos, one of them truncated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from vcompress import cli

CONFIG: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_frames": 8, "tubelet_size": 2,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "id2label": {"0": "left", "1": "right"},
}  # fmt: skip


def write_video(path: Path, seed: int, direction: int) -> None:
    """A bright square that moves over noise, 24 frames of 64x48."""
    generator = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(24):
            image = generator.integers(0, 60, (48, 64, 3)).astype(np.uint8)
            left = 20 + direction * t
            image[16:32, max(left, 0) : left + 16] = 220
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    module = VideoMAEForVideoClassification(VideoMAEConfig(**CONFIG))
    torch.save(
        {"family": "videomae", "config": CONFIG, "state_dict": module.state_dict()},
        tmp_path / "model.pt",
    )
    for number in range(12):
        label = ("left", "right")[number % 2]
        folder = tmp_path / "clips" / label
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{number:02d}.mp4", number, -1 if label == "left" else 1)
    whole = (tmp_path / "clips/left/00.mp4").read_bytes()
    (tmp_path / "clips/left/broken.mp4").write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str | None]:
    monkeypatch.setattr("sys.argv", ["vcompress", *arguments])
    return cli._run()


def test_from_a_checkpoint_and_a_folder_of_videos(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the README, then its plan edited and applied, then validated."""
    code, message = run(
        monkeypatch, "quantize", "model.pt", "--target", "nvfp4", "--calib", "clips/", "--output",
        "out/", "--no-engine", "--max-drop", "100", "--algorithm", "max",
    )  # fmt: skip
    assert code == 0, message
    printed = capsys.readouterr()
    assert "skipped" in printed.err
    assert "broken.mp4" in printed.err.replace("\n", "")
    assert "only 9 calibration clips" in printed.err.replace("\n", " ")
    assert "effective bits" in printed.out
    assert sorted(path.name for path in workplace.iterdir()) == ["clips", "model.pt", "out"]

    plan = (workplace / "out/plan.json").read_text().replace('"nvfp4"', '"int8"')
    plan = plan.replace('"target": "int8"', '"target": "nvfp4"')
    (workplace / "edited.json").write_text(plan)
    code, message = run(
        monkeypatch, "apply", "edited.json", "model.pt", "-o", "again/", "--no-engine",
        "--max-drop", "100",
    )  # fmt: skip
    assert code == 0, message
    assert "int8" in capsys.readouterr().out
    code, message = run(monkeypatch, "validate", "again/")
    assert code == 0, message
    assert "sha256 match" in capsys.readouterr().out


def test_other_clips_than_those_of_the_report_are_noticed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = run(
        monkeypatch, "quantize", "model.pt", "--target", "int8", "--calib", "clips/", "--output",
        "out/", "--no-engine", "--max-drop", "100", "--quiet",
    )  # fmt: skip
    assert code == 0, message
    write_video(workplace / "clips/right/01.mp4", 99, 1)
    write_video(workplace / "clips/left/02.mp4", 98, 1)
    write_video(workplace / "clips/right/03.mp4", 97, 1)
    for number in range(4, 12):
        label = ("left", "right")[number % 2]
        write_video(workplace / f"clips/{label}/{number:02d}.mp4", 50 + number, 1)
    code, message = run(monkeypatch, "validate", "out/")
    assert code == 2
    assert "these are not the test clips of the report" in str(message)


def test_large_weights_lie_beside_their_graphs_and_those_of_the_baseline_nowhere(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a model of more than 1.8 GB, whose files of ONNX would be too large for one message."""
    monkeypatch.setattr("vcompress.export.graph.EXTERNAL_DATA_BYTES", 10_000)
    code, message = run(
        monkeypatch, "quantize", "model.pt", "--target", "int8", "--calib", "clips/", "--output",
        "out/", "--no-engine", "--max-drop", "100", "--quiet", "--algorithm", "max",
    )  # fmt: skip
    assert code == 0, message
    names = {path.name for path in (workplace / "out").iterdir()}
    assert {"model.onnx", "model.onnx.data", "model.tensorrt.onnx.data"} <= names
    assert not [name for name in names if "baseline" in name]
    code, message = run(monkeypatch, "validate", "out/")
    assert code == 0, message
