"""Decoding real videos: exact frames, geometry and colour, and hostile files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from vcompress.calib import decode
from vcompress.calib.decode import read_frames
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError, MissingCapabilityError

Numbers = Callable[[npt.NDArray[np.uint8]], list[int]]
Make = Callable[..., Path]

KINDS = {
    "h264.mp4": {},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "av1.mp4": {"codec": "libsvtav1"},
    "hevc.mov": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "prores.mov": {"codec": "prores", "pixel_format": "yuv422p10le"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "h264.mkv": {},
    "h264.ts": {},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "flv1.flv": {"codec": "flv"},
    "wmv2.wmv": {"codec": "wmv2"},
    "anim.gif": {"codec": "gif", "pixel_format": "rgb8"},
}


def spec(**fields: Any) -> ClipSpec:
    return ClipSpec(**{"num_frames": 8, "height": 48, "width": 96, "stride": 3, **fields})


@pytest.mark.parametrize("name", KINDS)
def test_exact_frames_of_every_container(
    tmp_path: Path, make_video: Make, numbers_of: Numbers, name: str
) -> None:
    path = make_video(tmp_path / name, **KINDS[name])
    frames = read_frames(path, spec())
    assert frames.shape == (8, 48, 96, 3)
    assert frames.dtype == np.uint8
    # 40 frames, span 7 * 3 + 1 = 22: 9 in front of it.
    assert numbers_of(frames) == [9, 12, 15, 18, 21, 24, 27, 30]
    # At 12.5 frames a second there are 20, span 4: 8 in front of it.
    half = read_frames(path, spec(num_frames=4, stride=1, fps=12.5))
    assert numbers_of(half) == [16, 18, 20, 22]


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(10, [0, 3, 6, 9, 9]), (13, [0, 3, 6, 9, 12]), (1, [0] * 5)]
)
def test_a_short_video_repeats_its_last_frame(
    tmp_path: Path, make_video: Make, numbers_of: Numbers, num_frames: int, expected: list[int]
) -> None:
    path = make_video(tmp_path / "short.mp4", num_frames=num_frames)
    assert numbers_of(read_frames(path, spec(num_frames=5))) == expected


def test_variable_frame_rate_is_sampled_by_time(
    tmp_path: Path, make_video: Make, numbers_of: Numbers
) -> None:
    # At 25 ticks a second: frame 0 for 0.4 s, then 1, 2, 3, 4 for a tick each.
    path = make_video(tmp_path / "vfr.mkv", num_frames=5, stamps=[0, 10, 11, 12, 13])
    by_time = read_frames(path, spec(num_frames=14, stride=1, fps=25.0))
    assert numbers_of(by_time) == [0] * 10 + [1, 2, 3, 4]
    assert numbers_of(read_frames(path, spec(num_frames=5, stride=1))) == [0, 1, 2, 3, 4]


def test_frames_before_the_start_of_an_edit_do_not_count(
    tmp_path: Path, make_video: Make, numbers_of: Numbers
) -> None:
    # A clip that was cut out without encoding: it starts at a keyframe, 0, and an edit list
    # says that the first ten frames are not shown.
    whole = make_video(tmp_path / "whole.mp4", options={"bf": "0"})
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                assert packet.pts is not None
                packet.pts -= 10 * 512
                packet.dts -= 10 * 512
                packet.stream = stream
                output.mux(packet)
    assert numbers_of(read_frames(cut, spec(num_frames=30, stride=1))) == list(range(10, 40))


def test_packets_that_show_nothing_are_not_frames(
    tmp_path: Path, make_video: Make, numbers_of: Numbers
) -> None:
    # Bit 4 of a VP8 packet says whether its frame is shown; six of the 40 are hidden here.
    whole = make_video(tmp_path / "whole.webm", codec="libvpx")
    path = tmp_path / "hidden.webm"
    with av.open(str(whole)) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            content = bytearray(bytes(packet))
            if 20 <= number < 26:
                content[0] &= ~0x10
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe = packet.is_keyframe
            copy.stream = stream
            output.mux(copy)
    # 34 frames, span 22: frame 6 is the first, and from frame 20 on the numbers are 6 higher.
    assert numbers_of(read_frames(path, spec())) == [6, 9, 12, 15, 18, 27, 30, 33]


def pattern() -> npt.NDArray[np.uint8]:
    """Red, green / blue, light gray: `[40, 80, 3]`."""
    frame = np.empty((40, 80, 3), np.uint8)
    frame[:20, :40], frame[:20, 40:] = (255, 0, 0), (0, 255, 0)
    frame[20:, :40], frame[20:, 40:] = (0, 0, 255), (200, 200, 200)
    return frame


def test_lossless_video_of_the_right_size_is_unchanged(tmp_path: Path, make_video: Make) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (37, 53, 3), np.uint8)
    path = make_video(tmp_path / "a.mkv", frames=[noise], codec="ffv1", pixel_format="bgr0")
    frames = read_frames(path, spec(num_frames=1, height=37, width=53))
    assert np.array_equal(frames[0], noise)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("a.mp4", {"pixel_format": "yuv444p"}),
        ("a.mp4", {"pixel_format": "yuv420p10le"}),
        ("a.avi", {"codec": "mjpeg", "pixel_format": "yuvj444p", "options": {"qmax": "2"}}),
    ],
)
def test_colours(tmp_path: Path, make_video: Make, name: str, fields: dict[str, Any]) -> None:
    fields = {"options": {"crf": "1"}, **fields}
    path = make_video(tmp_path / name, frames=[pattern()] * 2, **fields)
    frames = read_frames(path, spec(num_frames=2, height=40, width=80))
    for row, column in ((10, 20), (10, 60), (30, 20), (30, 60)):
        difference = frames[1, row, column].astype(int) - pattern()[row, column]
        assert np.abs(difference).max() <= 3


def test_alpha_is_dropped(tmp_path: Path, make_video: Make) -> None:
    rgba = np.dstack([pattern(), np.full((40, 80), 7, np.uint8)])
    path = make_video(tmp_path / "a.mov", frames=[rgba], codec="qtrle", pixel_format="argb")
    frames = read_frames(path, spec(num_frames=1, height=40, width=80))
    assert np.array_equal(frames[0], pattern())


def test_gray(tmp_path: Path, make_video: Make) -> None:
    path = make_video(
        tmp_path / "a.mkv", frames=[pattern()], codec="ffv1", pixel_format="bgr0"
    )  # fmt: skip
    frames = read_frames(path, spec(num_frames=1, height=40, width=80, channels=1))
    assert frames.shape == (1, 40, 80, 1)
    assert [frames[0, y, x, 0] for y in (10, 30) for x in (20, 60)] == [76, 150, 29, 200]


def test_cover_crops_and_exact_stretches(tmp_path: Path, make_video: Make) -> None:
    # Black with white outer quarters, 40 x 80. Covering 20 x 20 gives 20 x 40, and the crop
    # keeps columns 10..30: only black. Stretching keeps a quarter of white on each side.
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, :20] = frame[:, 60:] = 255
    path = make_video(tmp_path / "a.mkv", frames=[frame], codec="ffv1", pixel_format="bgr0")
    covered = read_frames(path, spec(num_frames=1, height=20, width=20))[0, ..., 0]
    assert covered[:, 1:-1].max() == 0
    stretched = read_frames(path, spec(num_frames=1, height=20, width=20, resize="exact"))
    row = stretched[0, 10, :, 0]
    assert row[:4].min() == 255
    assert row[6:14].max() == 0
    assert row[16:].min() == 255


def test_making_smaller_averages(tmp_path: Path, make_video: Make) -> None:
    checkers = np.indices((64, 64)).sum(axis=0) % 2 * 255
    frame = np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8)
    path = make_video(tmp_path / "a.mkv", frames=[frame], codec="ffv1", pixel_format="bgr0")
    small = read_frames(path, spec(num_frames=1, height=16, width=16))[0, 2:-2, 2:-2]
    assert np.abs(small.astype(int) - 127).max() <= 4


@pytest.mark.parametrize(
    # Anticlockwise by 90 degrees, [[r, g], [b, w]] becomes [[g, w], [r, b]].
    ("rotation", "expected"),
    [(90, ["gw", "rb"]), (-90, ["br", "wg"]), (180, ["wb", "gr"]), (0, ["rg", "bw"])],
)
def test_a_rotated_video_is_turned_upright(
    tmp_path: Path, make_video: Make, rotation: int, expected: list[str]
) -> None:
    path = make_video(
        tmp_path / "a.mp4", frames=[pattern()] * 2, pixel_format="yuv444p", rotation=rotation
    )
    height, width = (80, 40) if rotation % 180 else (40, 80)
    frame = read_frames(path, spec(num_frames=1, height=height, width=width))[0] > 128
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    seen = ["".join(names[tuple(frame[y, x].astype(int))] for x in columns) for y in rows]
    assert seen == expected


ODD_NAMES = [
    "-rf.mp4", "%03d.mp4", "a*?[b].mp4", "file:x.mp4", "http:x.mp4", "a b\nc.mp4", "\u540d.mp4",
    "concat:a|b.mp4", "no suffix",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_only_names(
    tmp_path: Path, make_video: Make, numbers_of: Numbers, monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:  # fmt: skip
    source = make_video(tmp_path / "source.mp4")
    shutil.move(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers_of(read_frames(Path(name), spec(num_frames=1))) == [19]


def test_a_pattern_does_not_match_other_files(
    tmp_path: Path, make_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "001.mp4")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^%03d\.mp4: cannot be read \(No such file"):
        read_frames(Path("%03d.mp4"), spec())


def refused(path: Path, reason: str, **fields: Any) -> None:
    with pytest.raises(InputError) as caught:
        read_frames(path, spec(**fields))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\ngood.ts\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile 'good.mp4'\n",
    "mpd": "<?xml version='1.0'?><MPD><BaseURL>good.mp4</BaseURL></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
    "text": "this is not a video at all\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_and_text_are_not_followed(tmp_path: Path, make_video: Make, kind: str) -> None:
    make_video(tmp_path / "good.mp4")
    make_video(tmp_path / "good.ts")
    path = tmp_path / "list.mp4"
    path.write_text(PLAYLISTS[kind])
    refused(path, "not a video")


def test_a_playlist_behind_the_magic_of_a_video_opens_nothing(
    tmp_path: Path, make_video: Make
) -> None:
    make_video(tmp_path / "good.ts")
    path = tmp_path / "list.mp4"
    path.write_bytes(b"FLV\x01" + PLAYLISTS["m3u8"].encode())
    with pytest.raises(InputError):
        read_frames(path, spec())


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        frame.time_base = Fraction(1, 44100)
        frame.pts = 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def test_files_that_hold_no_video(tmp_path: Path) -> None:
    refused(audio_only(tmp_path / "sound.mp4"), "no video stream")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "the file is empty")
    refused(tmp_path, "not a regular file")
    refused(tmp_path / "missing.mp4", "No such file")
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    refused(pipe, "not a regular file")


def test_a_video_without_frames(tmp_path: Path, make_video: Make) -> None:
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.height, stream.width = 48, 96
        output.start_encoding()
    refused(path, "")
    # The header of Matroska stands in front of the first cluster.
    content = make_video(tmp_path / "a.mkv").read_bytes()
    path = tmp_path / "none.mkv"
    path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75")])
    refused(path, "truncated or corrupt")


@pytest.mark.parametrize("sixteenths", range(1, 15))
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("end.mp4", {}),
        ("front.mp4", {"movflags": "faststart"}),
        ("a.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
        ("a.mkv", {}),
        ("a.flv", {"codec": "flv"}),
    ],
)
def test_truncated(
    tmp_path: Path, make_video: Make, name: str, fields: dict[str, Any], sixteenths: int
) -> None:
    path = make_video(tmp_path / name, **fields)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenths // 16])
    refused(path, "")


def test_the_reason_of_a_truncated_video_has_the_numbers(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes()[:-300])
    refused(path, "of 1.60 s are there")


def test_corrupt(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + 700
    content[middle : middle + 400] = np.random.RandomState(0).bytes(400)
    path.write_bytes(content)
    refused(path, "corrupt video")


def test_a_packet_that_was_cut_off(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.avi", codec="mjpeg", pixel_format="yuvj420p")
    content = path.read_bytes()
    # In the middle of the last frame: all 40 have begun, and the index behind them is gone.
    start = content.rindex(b"00dc", 0, content.index(b"idx1"))
    size = int.from_bytes(content[start + 4 : start + 8], "little")
    path.write_bytes(content[: start + 8 + size // 2])
    refused(path, "packet 40 is incomplete")


def test_a_frame_that_the_decoder_flags(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.wmv", codec="wmv2")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 60] = np.random.RandomState(0).bytes(60)
    path.write_bytes(content)
    refused(path, "is damaged")


def test_damaged_files_never_raise_anything_else(tmp_path: Path, make_video: Make) -> None:
    random = np.random.RandomState(0)
    for name in ("h264.mp4", "mpeg4.avi", "vp8.webm", "h264.ts", "anim.gif"):
        original = make_video(tmp_path / name, **KINDS[name]).read_bytes()
        for _ in range(60):
            content = bytearray(original)
            for position in random.randint(0, len(content), random.choice([1, 4, 40])):
                content[position] = random.randint(256)
            path = tmp_path / f"damaged-{name}"
            path.write_bytes(content)
            with suppress(InputError):
                assert read_frames(path, spec()).shape == (8, 48, 96, 3)


def test_a_header_that_promises_a_giant_frame(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.gif", codec="gif", pixel_format="rgb8")
    content = bytearray(path.read_bytes())
    content[6:10] = (20_000).to_bytes(2, "little") * 2
    path.write_bytes(content)
    refused(path, "")


def test_a_frame_above_the_cap(
    tmp_path: Path, make_video: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_MAX_PIXELS", 96 * 48 - 1)
    refused(make_video(tmp_path / "a.mp4"), "at most 4607 pixels, got 96 x 48")


def test_a_clip_specification_that_asks_for_a_giant_frame(tmp_path: Path, make_video: Make) -> None:
    strip = np.zeros((16, 2048, 3), np.uint8)
    path = make_video(tmp_path / "a.mp4", frames=[strip])
    refused(path, "at most 67108864 pixels", height=1024, width=1024)


def test_too_many_frames(tmp_path: Path, make_video: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_MAX_FRAMES", 39)
    refused(make_video(tmp_path / "a.mp4"), "at most 39 frames")


def test_unusual_codecs_are_refused(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "a.avi", codec="asv1")
    refused(path, "the codec asv1 is not supported")


def test_without_pyav(tmp_path: Path, make_video: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingCapabilityError, match="pip install 'av>="):
        read_frames(path, spec())
