from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import nn

from vcompress import cli
from vcompress.calib.decode import read_frames
from vcompress.calib.preprocess import to_model_input
from vcompress.export.ahead import Ahead
from vcompress.export.deployed import Deployed, open_deployed
from vcompress.export.graph import export_onnx
from vcompress.export.publish import write_manifest
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

SPEC = ClipSpec(num_frames=4, height=8, width=8, stride=2, mean=(0.5,), std=(0.25,))
LABELS = ("red", "green", "blue")

# Run in a process of its own: nothing that the runtime does not need can be imported there.
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "scipy", "modelopt", "rich",
            "jinja2", "transformers", "ml_dtypes",
        }:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from vcompress import cli
sys.argv = ["vcompress", *sys.argv[1:]]
cli.main()
"""


class Brightest(nn.Module):
    """Scores of the three colours: their mean, ten times."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return 10 * clips.mean(dim=(1, 3, 4))


@functools.cache
def exported(dynamic: bool) -> tuple[list[int | str], bytes]:
    example = torch.zeros(2, *SPEC.input_shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        facts = export_onnx(Brightest(), example, path, dialect="portable", dynamic_batch=dynamic)
        return list(facts.input_shape), path.read_bytes()


def make_artifact(folder: Path, *, dynamic: bool = True, **changes: Any) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(2, *SPEC.input_shape)).astype(np.float32)
    shape, content = exported(dynamic)
    (folder / "model.onnx").write_bytes(content)
    outputs = Brightest()(torch.from_numpy(inputs)).numpy()
    np.savez(folder / "golden.npz", inputs=inputs, outputs=outputs + changes.pop("error", 0))
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
    manifest = {
        "schema": 1, "vcompress": "0.1.0", "created": "2026-01-01T00:00:00Z", "name": "brightest",
        "source": {}, "task": "classify", "labels": "labels.txt", "precision": {}, "requires": {},
        "inputs": [{"name": "pixel_values", "shape": shape}],
        "outputs": [{"name": "output", "shape": [shape[0], 3]}],
        "clip": SPEC.as_dict(),
        "golden": {
            "file": "golden.npz", "inputs": "inputs", "outputs": "outputs", "max": 0.05,
        },
        **changes,
    }  # fmt: skip
    roles = {"model.onnx": "onnx", "golden.npz": "golden", "labels.txt": "labels"}
    write_manifest(folder, manifest, roles=roles)
    return folder


def write_video(path: Path, colours: list[int], *, size: int = 16) -> Path:
    """One frame of each colour (0 red, 1 green, 2 blue), losslessly."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = size, size, "bgr0"
        for colour in colours:
            pixels = np.full((size, size, 3), 40, np.uint8)
            pixels[..., colour] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("deployed") / "out")


@pytest.fixture(scope="module")
def deployed(artifact: Path) -> Deployed:
    return open_deployed(artifact, threads=1)


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    return [write_video(tmp_path / f"{LABELS[c]}.mkv", [c] * 12) for c in (0, 1, 2)]


def test_a_video_is_answered_as_the_manifest_says(deployed: Deployed, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mkv", [0] * 4 + [2] * 8)
    (answer,) = deployed.answers([video])
    clip = to_model_input(read_frames(video, SPEC), SPEC)
    wanted = Brightest()(torch.from_numpy(clip[None])).numpy()[0]
    np.testing.assert_allclose(answer.outputs["output"], wanted, rtol=1e-5)
    assert answer.label == "blue"
    assert answer.score == pytest.approx(float(torch.from_numpy(wanted).softmax(0)[2]), rel=1e-5)
    assert deployed.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_change_no_answer(deployed: Deployed, videos: list[Path], batch: int) -> None:
    answers = list(deployed.answers(videos, batch=batch))
    assert [answer.label for answer in answers] == list(LABELS)
    assert [answer.video for answer in answers] == [str(video) for video in videos]


def test_a_fixed_batch_is_filled_up(tmp_path: Path, videos: list[Path]) -> None:
    deployed = open_deployed(make_artifact(tmp_path / "out", dynamic=False), threads=1)
    assert deployed.max_batch == 2
    answers = list(deployed.answers(videos, batch=3))
    assert [answer.label for answer in answers] == list(LABELS)
    assert deployed.check() < 1e-5


def test_windows_slide_over_several_videos_in_turn(deployed: Deployed, tmp_path: Path) -> None:
    # At stride 2 of the clip the model sees every second frame: 10 of them, 4 in a window.
    first = write_video(tmp_path / "a.mkv", [0] * 10 + [1] * 10)
    second = write_video(tmp_path / "b.mkv", [2] * 6)
    answers = list(deployed.windows([first, second], stride=3, batch=2))
    assert [(answer.video[-5], answer.label) for answer in answers] == [
        ("a", "red"), ("b", "blue"), ("a", "green"), ("a", "green"),
    ]  # fmt: skip
    assert [answer.start_seconds for answer in answers] == pytest.approx([0, 0, 0.6, 1.2])
    # The short one is filled up with its last frame.
    assert [answer.end_seconds for answer in answers] == pytest.approx([0.6, 0.4, 1.2, 1.8])


def test_many_videos_are_not_decoded_all_at_once(deployed: Deployed, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mkv", [1] * 8)
    before = threading.active_count()
    most = 0
    found = []
    for answer in deployed.windows([video] * 40, stride=4):
        most = max(most, threading.active_count() - before)
        found.append(answer.label)
    assert found == ["green"] * 40
    assert 0 < most <= 16


def test_a_damaged_video_is_named_and_the_others_are_answered(
    deployed: Deployed, videos: list[Path]
) -> None:
    videos[1].write_bytes(videos[1].read_bytes()[:300])
    seen: list[str] = []
    answers = list(deployed.answers(videos, skipped=lambda video, _error: seen.append(video)))
    assert [answer.label for answer in answers] == ["red", "blue"]
    assert seen == [str(videos[1])]
    seen.clear()
    windows = deployed.windows(videos, stride=1, skipped=lambda video, _error: seen.append(video))
    assert {answer.label for answer in windows} >= {"red", "blue"}
    assert seen == [str(videos[1])]
    with pytest.raises(InputError, match="green"):
        list(deployed.answers(videos))


def test_golden_clips_are_checked(tmp_path: Path, deployed: Deployed) -> None:
    assert deployed.check() < 1e-6
    wrong = open_deployed(make_artifact(tmp_path / "wrong", error=3.0), threads=1)
    with pytest.raises(BuildError, match="computes something else on CPUExecutionProvider"):
        wrong.check()


def test_what_cannot_be_run_is_refused(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(InputError, match=r"unknown runtime 'tflite'.*onnxruntime"):
        open_deployed(artifact, runtime="tflite")
    with pytest.raises(MissingCapabilityError, match="CUDAExecutionProvider"):
        open_deployed(artifact, provider="CUDAExecutionProvider")
    calls = make_artifact(tmp_path / "calls", clip=None)
    with pytest.raises(InputError, match="a model of calls"):
        open_deployed(calls)


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_runs_without_torch(artifact: Path, videos: list[Path]) -> None:
    arrays = artifact.parent / "arrays.npz"
    done = without_torch(
        "run", str(artifact), *map(str, videos), "--json", "--check", "--batch", "2",
        "--arrays", str(arrays),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, *answers = map(json.loads, done.stdout.splitlines())
    assert head["providers"] == ["CPUExecutionProvider"]
    assert head["golden_relative_l2"] < 1e-6
    assert [answer["top"][0]["label"] for answer in answers] == list(LABELS)
    assert len(answers[0]["outputs"]["output"]) == 3
    with np.load(arrays) as saved:
        assert saved["output"].shape == (3, 3)
        assert saved["videos"].tolist() == [str(video) for video in videos]


def test_a_folder_is_all_of_its_videos(artifact: Path, videos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    done = without_torch("run", str(artifact), str(tmp_path), str(videos[0]), "--json")
    assert done.returncode == 0, done.stderr
    _, *answers = map(json.loads, done.stdout.splitlines())
    # In the order of the names: blue, green, red; then the one that is named.
    expected = [LABELS[2], LABELS[1], LABELS[0], LABELS[0]]
    assert [answer["top"][0]["label"] for answer in answers] == expected
    empty = tmp_path / "empty"
    empty.mkdir()
    done = without_torch("run", str(artifact), str(empty))
    assert done.returncode == 2
    assert "must hold at least one video" in done.stderr


def test_a_video_that_was_left_out_is_no_success(artifact: Path, videos: list[Path]) -> None:
    videos[0].write_bytes(b"no video")
    done = without_torch("run", str(artifact), *map(str, videos))
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2
    assert "red.mkv" in done.stderr.splitlines()[-1]


def test_run_prints_lines_of_windows(
    artifact: Path, videos: list[Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ["vcompress", "run", str(artifact), str(videos[2]), "--stride", "1", "--top", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert "blue" in printed.out.splitlines()[0]
    assert "CPUExecutionProvider" in printed.err


def test_work_is_done_ahead_and_errors_come_in_their_place() -> None:
    taken = []

    def source() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number
        message = "broken"
        raise ValueError(message)

    ahead = Ahead(source(), 2)
    assert [next(ahead), next(ahead), next(ahead)] == [0, 1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(ahead)
    endless = Ahead(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()
    assert list(endless) == []


def run_example(name: str, *words: str, program: str = PROGRAM) -> list[str]:
    """Lines that an example prints, without what `program` blocks."""
    example = Path(cli.__file__).parent / "examples" / name
    program = (
        program.replace("from vcompress import cli", "import runpy")
        .replace("cli.main()", "runpy.run_path(sys.argv[0], run_name='__main__')")
        .replace('["vcompress", *sys.argv[1:]]', "sys.argv[1:]")
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(example), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_example_runs_without_torch(artifact: Path, videos: list[Path]) -> None:
    head, *lines = run_example("deploy.py", str(artifact), *map(str, videos))
    assert "CPUExecutionProvider" in head
    # Six frames a video at stride 2: one window of four.
    assert [line.split()[-2] for line in lines] == ["red", "green", "blue"] * 2


def test_the_example_for_a_jetson_runs_in_another_runtime(
    artifact: Path, videos: list[Path]
) -> None:
    # It can build engines, for which it needs onnx, but not torch.
    program = re.sub(r"in \{.*?\}", 'in {"torch", "onnxscript", "rich"}', PROGRAM, flags=re.DOTALL)
    head, *lines = run_example(
        "jetson.py", str(artifact), str(videos[0]), "onnxruntime", program=program
    )
    assert "golden clips" in head
    assert lines
    assert all(line.split()[-2] == "red" for line in lines)
