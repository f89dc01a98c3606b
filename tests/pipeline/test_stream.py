"""Streams as a user meets them: from Python, from the command line, and with bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import vcompress
from vcompress import cli
from vcompress.models.load import ADAPTERS, LoadOptions, wrap_module
from vcompress.models.video import VideoModel
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

FRAMES, SIZE = 8, 16
Timed = tuple[float, npt.NDArray[np.uint8]]


class Factorised(nn.Module):
    """Features of frames, a position, and a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.wide = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.moments = nn.Parameter(torch.randn(1, FRAMES, 1, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        places = self.embed(clips.flatten(0, 1)).flatten(2).transpose(1, 2)
        rows = self.wide(places).unflatten(0, (len(clips), -1))
        return self.head((rows + self.moments[:, : rows.shape[1]]).tanh().mean(dim=(1, 2)))


class Joint(nn.Module):
    """Dark, medium or bright, of all frames at once; a moving mean hides nothing in stages."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(3, 4, (FRAMES, 4, 4), padding=(FRAMES // 2, 0, 0))
        self.head = nn.Linear(1, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-60.0], [0.0], [60.0]]))
            self.head.bias.copy_(torch.tensor([21.0, 0.0, -39.0]))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        noise = self.volume(clips.transpose(1, 2)).mean(dim=(1, 2, 3, 4)) * 1e-6
        return self.head((clips.mean(dim=(1, 2, 3, 4)) + noise)[:, None])


def model_of(module: nn.Module, labels: tuple[str, ...] = ("a", "b", "c")) -> VideoModel:
    clip = ClipSpec(num_frames=FRAMES, height=SIZE, width=SIZE)
    return wrap_module(module, name="small", options=LoadOptions(), clip=clip, labels=labels)


def noise(count: int, seed: int = 0) -> Iterator[Timed]:
    generator = np.random.default_rng(seed)
    for index in range(count):
        yield index / 25, generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def steps(count: int, seed: int) -> list[npt.NDArray[np.uint8]]:
    """Frames of a brightness that stays for a while; a little noise on top."""
    generator = np.random.default_rng(seed)
    frames: list[npt.NDArray[np.uint8]] = []
    while len(frames) < count:
        level = generator.choice([30, 128, 225])
        for _ in range(int(generator.integers(25, 50))):
            frame = level + generator.normal(0, 2, (SIZE, SIZE, 3))
            frames.append(np.rint(frame).astype(np.uint8))
    return frames[:count]


def write_video(path: Path, frames: list[npt.NDArray[np.uint8]]) -> Path:
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VideoPrism."""
    torch.manual_seed(0)
    config = {
        "image_size": SIZE, "num_frames": FRAMES, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64, "tubelet_size": [1, 4, 4], "num_spatial_layers": 3,
        "num_temporal_layers": 1, "id2label": {"0": "run", "1": "walk"},
    }  # fmt: skip
    (adapter,) = [one for one in ADAPTERS if one.family == "videoprism_vision_model"]
    path = tmp_path_factory.mktemp("stream") / "m.pt"
    state = adapter.build(config).state_dict()
    torch.save({"family": adapter.family, "config": config, "state_dict": state}, path)
    return path


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_every_window_has_the_bits_of_the_model(stride: int) -> None:
    torch.manual_seed(0)
    model = model_of(Factorised())
    pixels = np.stack([frame for _, frame in noise(30)])
    windows = vcompress.stream(model, noise(30), stride=stride, num_checks=2)
    found = list(windows)
    assert windows.reuse.kind == ("none" if stride == FRAMES else "exact")
    assert len(found) == (30 - FRAMES) // stride + 1
    for window in found:
        start = window.index * stride
        clip = torch.from_numpy(pixels[start : start + FRAMES]).permute(0, 3, 1, 2).float() / 255
        expected = model(((clip * 255) * np.float32(1 / 255))[None])
        if windows.reuse.kind == "exact" and not windows.reuse.difference:
            assert torch.allclose(window.output, expected, atol=1e-6)
        assert window.label == "abc"[int(window.output.argmax())]
        assert window.score == pytest.approx(float(window.output.softmax(-1).max()), abs=1e-6)
        assert window.time_seconds == pytest.approx((start + FRAMES - 1) / 25)
        assert window.start_seconds == pytest.approx(start / 25)
    if windows.reuse.kind == "exact":
        assert (windows.summary.num_checked, windows.summary.num_equal) == (2, 2)
        # Against recomputing in the product's own words, to the bit.
        anew = vcompress.stream(model, noise(30), stride=stride, reuse="none")
        if not windows.reuse.difference:
            assert all(
                torch.equal(one.output, other.output)
                for one, other in zip(found, anew, strict=True)
            )


class Batched(Factorised):
    """Features whose last bits depend on how many frames are given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Uneven()


class Uneven(nn.Module):
    """A convolution whose result is a little larger for more frames."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(16, 3, 4, 4))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(frames, self.weight, stride=4) * (1 + 2e-6 * len(frames))


def test_last_bits_that_depend_on_the_batch_are_told() -> None:
    torch.manual_seed(0)
    windows = vcompress.stream(model_of(Batched()), noise(20), stride=4, num_checks=2)
    assert windows.reuse.kind == "exact"
    assert 0 < windows.reuse.difference < 1e-3
    assert "equal bit for bit to frames taken 4 at a time" in windows.reuse.reason
    list(windows)
    assert (windows.summary.num_checked, windows.summary.num_equal) == (2, 2)


class Warnings:
    """Progress that keeps what it is warned of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, _name: str, _total: int | None = None) -> Any:
        return nullcontext(lambda _done: None)

    def warn(self, text: str) -> None:
        self.texts.append(text)


def test_a_window_that_differs_ends_the_reuse() -> None:
    torch.manual_seed(0)
    model, warned = model_of(Factorised()), Warnings()
    windows = vcompress.stream(model, noise(20), stride=2, num_checks=2, progress=warned)
    answers = [next(windows)]
    windows._answering._features._rows.add_(1)  # type: ignore[attr-defined]
    answers += list(windows)
    assert len(warned.texts) == 1
    assert "window 1 from kept features is not that computed anew" in warned.texts[0]
    assert windows.reuse.kind == "none"
    assert windows.summary.num_equal == 0
    for one, two in zip(answers[1:], islice(noise_windows(model), 1, None), strict=True):
        assert torch.equal(one.output, two)


def noise_windows(model: VideoModel) -> Iterator[torch.Tensor]:
    for window in vcompress.stream(model, noise(20), stride=2, reuse="none"):
        yield window.output


def test_buffers_do_not_grow() -> None:
    torch.manual_seed(0)
    windows = vcompress.stream(model_of(Factorised()), noise(10**9), stride=2, num_checks=1)
    for _ in islice(windows, 5):
        pass
    before = held(windows)
    for _ in islice(windows, 300):
        pass
    assert held(windows) == before


def held(windows: Any) -> int:
    """Bytes of all tensors that a stream can reach, apart from its model's."""
    seen: set[int] = set()
    total, pending = 0, [windows._answering, windows._anew, windows._stages, windows._counts]
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            total += one.numel() * one.element_size()
        elif isinstance(one, list | tuple):
            pending += list(one)
        elif hasattr(one, "__dict__") and not isinstance(one, nn.Module):
            pending += list(vars(one).values())
    return total


def test_a_joint_model_repeats_answers_where_that_was_proved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(Joint())
    calib = tmp_path / "calib"
    calib.mkdir()
    for seed in range(6):
        write_video(calib / f"{seed}.mp4", steps(150, seed))
    plain = vcompress.stream(model, noise(20), stride=2)
    assert plain.reuse.kind == "none"
    assert "--calib" in plain.reuse.reason
    frames = [(index / 25, frame) for index, frame in enumerate(steps(200, 99))]
    windows = vcompress.stream(model, frames, stride=2, calib=str(calib), min_agreement=0.9)
    assert windows.reuse.kind == "approximate", windows.reuse.reason
    assert windows.reuse.gate is not None
    assert windows.reuse.gate.max_repeats == 4
    assert windows.reuse.proof is not None
    assert windows.reuse.proof.agreement >= 0.9
    found = list(windows)
    anew = list(vcompress.stream(model, frames, stride=2, reuse="none"))
    assert windows.summary.num_repeated == sum(window.repeated for window in found) > 20
    agreed = sum(one.label == two.label for one, two in zip(found, anew, strict=True))
    assert agreed / len(found) >= 0.9
    # A gate that was found once needs no videos again.
    again = list(vcompress.stream(model, frames, stride=2, gate=windows.reuse.gate))
    assert [window.label for window in again] == [window.label for window in found]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"stride": 0}, "--stride must be from 1 to the window's 8 frames, got 0"),
        ({"stride": 9}, "got 9; beyond that"),
        ({"window": 5}, "--window must be what small takes, 8 frames; got 5"),
        ({"reuse": "some"}, "--reuse must be one of auto, exact"),
        ({"reuse": "approximate"}, "add --calib"),
        ({"min_agreement": 0.0}, "--min-agreement must be above 0"),
        ({"calib": "absent"}, "--calib must be a folder of videos, got absent"),
        ({"reuse": "exact"}, "--reuse exact is impossible: small"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], expected: str) -> None:
    class Strict(Joint):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return super().forward(clips.unflatten(1, (2, 4)).flatten(1, 2))

    with pytest.raises(InputError) as caught:
        vcompress.stream(model_of(Strict()), noise(20), **{"stride": 2, **arguments})
    assert expected in str(caught.value)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, list[str]]:
    """Exit code, error message and standard output of `vcompress stream ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["vcompress", "stream", *map(str, arguments)])
    code, message = cli._run()
    return code, message or "", capsys.readouterr().out.splitlines()


def test_the_command_prints_a_line_a_window(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    video = write_video(tmp_path / "a.mp4", steps(24, 0))
    code, _, lines = run(
        monkeypatch, capsys, checkpoint, video, "--window", 8, "--stride", 2, "--json"
    )
    assert code == 0
    head, *windows, tail = map(json.loads, lines)
    assert head["reuse"]["kind"] == "exact"
    assert head["reuse"]["module"] == "vision_model.layernorm1"
    assert [window["window"] for window in windows] == list(range(9))
    assert all(window["label"] in ("run", "walk") for window in windows)
    assert windows[1]["time_seconds"] == pytest.approx(9 / 25)
    assert tail["summary"]["num_equal"] == tail["summary"]["num_checked"] == 3
    assert tail["summary"]["speed_up"] > 0
    code, _, lines = run(monkeypatch, capsys, checkpoint, video, "--stride", 8)
    assert code == 0
    assert "none: m sees every frame once" in lines[1]
    assert len(lines) == 3 + 3 + 2


def test_bad_input_ends_with_one_line(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    short = write_video(tmp_path / "short.mp4", steps(5, 0))
    (tmp_path / "text.mp4").write_text("no video, but long enough to be looked at")
    for arguments, expected in (
        ((short,), "a window takes 8 frames, there are only 5"),
        ((tmp_path / "text.mp4",), "not a video"),
        ((tmp_path / "absent.mp4",), "cannot be read"),
        ((short, "--stride", 20), "--stride must be from 1"),
        ((short, "--stride", 0, "--json"), "not in the range"),
    ):
        code, message, lines = run(monkeypatch, capsys, checkpoint, *arguments)
        assert (code, lines) == (2, [])
        assert expected in message
        assert "\n" not in message
    noisy = np.random.default_rng(0).integers(0, 256, (60, 48, 48, 3), np.uint8)
    cut = write_video(tmp_path / "cut.avi", list(noisy))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    code, message, lines = run(monkeypatch, capsys, checkpoint, cut, "--stride", 4)
    # What came before the damage has been answered.
    assert code == 2
    assert "truncated" in message
    assert len(lines) > 6
