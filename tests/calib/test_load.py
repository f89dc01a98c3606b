"""Clips from folders, videos, archives and Python objects."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vcompress.calib import archives, folder
from vcompress.calib.clips import Clips
from vcompress.calib.load import load_clips
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import InputError

Numbers = Callable[[npt.NDArray[np.uint8]], list[int]]
Make = Callable[..., Path]

VIDEO = ClipSpec(num_frames=4, height=48, width=96)
SPEC = ClipSpec(num_frames=2, height=4, width=5)
FRAMES = np.random.RandomState(0).randint(0, 256, (6, 2, 4, 5, 3), np.uint8)
READY = np.random.RandomState(0).standard_normal((6, 2, 3, 4, 5)).astype(np.float32)


@pytest.fixture
def video(tmp_path: Path, make_video: Make) -> Path:
    return make_video(tmp_path / "source.mp4", num_frames=10)


@pytest.fixture
def clips_folder(tmp_path: Path, video: Path) -> Path:
    root = tmp_path / "clips"
    for name in ("b/2.mp4", "b/1.mp4", "a/deep/3.mp4", "c c/4.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / name)
    return root


def test_a_video_file(video: Path, numbers_of: Numbers) -> None:
    clips = load_clips(str(video), VIDEO)
    assert clips.names == ("source.mp4",)
    assert clips.labels is None
    assert numbers_of(clips.data[0]) == [3, 4, 5, 6]


def test_a_bad_video_file_is_an_error(video: Path) -> None:
    video.write_bytes(video.read_bytes()[:500])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_clips(video, VIDEO)


def test_a_folder_is_read_in_the_order_of_names(clips_folder: Path) -> None:
    clips = load_clips(clips_folder, VIDEO)
    assert clips.names == ("a/deep/3.mp4", "b/1.mp4", "b/2.mp4", "c c/4.mp4")
    assert clips.labels == (0, 1, 1, 2)
    assert clips.skipped == ()
    assert clips.data.shape == (4, 4, 48, 96, 3)
    assert clips.digest == load_clips(str(clips_folder), VIDEO).digest


def test_folder_names_are_looked_up_in_the_classes(clips_folder: Path) -> None:
    names = ["c c", "unused", "a", "b"]
    assert load_clips(clips_folder, VIDEO, label_names=names).labels == (2, 3, 3, 0)
    with pytest.raises(InputError, match="'c c' is not a class of the model; did you mean 'cc'"):
        load_clips(clips_folder, VIDEO, label_names=["a", "b", "cc"])


def test_one_video_outside_the_sub_folders_means_no_labels(clips_folder: Path) -> None:
    shutil.copy(clips_folder / "b" / "1.mp4", clips_folder / "0.mp4")
    clips = load_clips(clips_folder, VIDEO, label_names=["something", "else"])
    assert clips.labels is None
    assert clips.names[0] == "0.mp4"


def test_a_limit_draws_with_the_seed(tmp_path: Path, video: Path) -> None:
    root = tmp_path / "clips"
    for number in range(12):
        (root / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / f"{number % 3}" / f"{number:02d}.mp4")
    drawn = load_clips(root, VIDEO, limit=4, seed=1)
    assert len(drawn) == 4
    assert len(set(drawn.names)) == 4
    assert [int(name[0]) for name in drawn.names] == list(drawn.labels or ())
    assert load_clips(root, VIDEO, limit=4, seed=1).names == drawn.names
    assert load_clips(root, VIDEO, limit=4, seed=2).names != drawn.names
    assert load_clips(root, VIDEO, limit=12).names == load_clips(root, VIDEO).names
    # A bad clip among the drawn ones is replaced by the next.
    (root / drawn.names[1]).write_bytes(b"")
    replaced = load_clips(root, VIDEO, limit=4, seed=1)
    assert len(replaced) == 4
    assert replaced.names[:2] == (drawn.names[0], drawn.names[2])
    assert replaced.skipped == ((drawn.names[1], "the file is empty"),)


def test_what_cannot_be_used_is_skipped_with_the_reason(clips_folder: Path) -> None:
    content = (clips_folder / "b" / "1.mp4").read_bytes()
    (clips_folder / "b" / "cut.mp4").write_bytes(content[: len(content) // 2])
    (clips_folder / "b" / "text.mp4").write_text("not a video")
    (clips_folder / "b" / "new\nline.mp4").write_text("")
    (clips_folder / "b" / "notes.txt").write_text("ignored")
    (clips_folder / "b" / "._1.mp4").write_text("ignored")
    os.mkfifo(clips_folder / "b" / "pipe.mp4")
    (clips_folder / "b" / "gone.mp4").symlink_to("nowhere.mp4")
    (clips_folder / "b" / "loop").symlink_to(clips_folder)
    (clips_folder / "b" / "linked.mp4").symlink_to("1.mp4")
    clips = load_clips(clips_folder, VIDEO)
    assert clips.names == ("a/deep/3.mp4", "b/1.mp4", "b/2.mp4", "b/linked.mp4", "c c/4.mp4")
    assert clips.labels == (0, 1, 1, 1, 2)
    reasons = dict(clips.skipped)
    assert set(reasons) == {
        "b/cut.mp4", "b/text.mp4", "b/new\\nline.mp4", "b/pipe.mp4", "b/gone.mp4", "b/loop",
    }  # fmt: skip
    assert reasons["b/cut.mp4"].startswith("truncated or corrupt")
    assert reasons["b/text.mp4"].startswith("not a video")
    assert reasons["b/new\\nline.mp4"] == "the file is empty"
    assert reasons["b/pipe.mp4"] == "not a regular file"
    assert reasons["b/loop"] == "a link to a folder is not followed"


def test_a_folder_without_a_readable_video_lists_the_first_reasons(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.mp4").write_text("x" * number)
    with pytest.raises(
        InputError, match=r"none of 5 could be read: 0\.mp4: the file is empty"
    ) as e:
        load_clips(tmp_path, VIDEO)
    assert "2.mp4" in str(e.value)
    assert "3.mp4" not in str(e.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"at least one video, found none \(nothing else\)"):
        load_clips(tmp_path, VIDEO)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jpg").touch()
    with pytest.raises(InputError, match=r"found none \(2 other files\).*\.mp4"):
        load_clips(tmp_path, VIDEO)


def test_folders_are_bounded(clips_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 4 * 4 * 48 * 96 * 3 - 1)
    with pytest.raises(InputError, match=r"the 4 clips in .* may take at most 0 MiB"):
        load_clips(clips_folder, VIDEO)
    assert len(load_clips(clips_folder, VIDEO, limit=3)) == 3
    monkeypatch.setattr(folder, "_MAX_ENTRIES", 5)
    with pytest.raises(InputError, match="more than 5 entries"):
        load_clips(clips_folder, VIDEO, limit=3)


@pytest.mark.parametrize(
    "source", ["missing", "missing.npz", "nul\0byte", "x" * 5000], ids=["dir", "npz", "nul", "long"]
)
def test_a_path_that_is_not_there(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match=r"cannot find the clips .* give a folder of videos"):
        load_clips(tmp_path / source, VIDEO)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_clips(tmp_path / "pipe.npz", VIDEO)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "clips.npz"
    save(path, clips=FRAMES, labels=np.arange(6), names=np.array(list("abcdef")))
    clips = load_clips(path, SPEC)
    assert clips.names == tuple("abcdef")
    assert clips.labels == (0, 1, 2, 3, 4, 5)
    assert clips.digest == Clips.from_frames(FRAMES, SPEC, names=list("abcdef")).digest
    drawn = load_clips(path, SPEC, limit=2, seed=3)
    assert len(drawn) == 2
    assert drawn.names == tuple("abcdef"[label] for label in drawn.labels or ())


def test_npz_of_ready_inputs_in_other_memory_orders(tmp_path: Path) -> None:
    path = tmp_path / "clips.npz"
    np.savez(path, clips=np.asfortranarray(READY).astype(">f4"))
    clips = load_clips(path, SPEC)
    assert np.array_equal(np.stack(list(clips)), READY)
    assert clips.labels is None
    assert clips.digest == Clips.from_array(READY, SPEC).digest


def bad_npz(tmp_path: Path, reason: str, **arrays: Any) -> None:
    path = tmp_path / "clips.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=reason) as caught:
        load_clips(path, SPEC, label_names=["a", "b"])
    assert str(caught.value).startswith(f"{path}: ")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_objects_in_npz_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad_npz(tmp_path, "objects are never loaded", clips=np.array([Payload()], object))
    bad_npz(tmp_path, "objects are never", clips=FRAMES, names=np.array([Payload()], object))
    assert not (tmp_path / "executed").exists()


def test_npz_that_does_not_fit(tmp_path: Path) -> None:
    bad_npz(tmp_path, "unknown entry 'clip'; did you mean 'clips'", clip=FRAMES)
    bad_npz(tmp_path, "'clips' is missing", labels=np.arange(6))
    bad_npz(tmp_path, "unknown entry 'label'", clips=FRAMES, label=np.arange(6))
    bad_npz(tmp_path, r"got uint8 of shape \[6, 2, 4, 5\]", clips=FRAMES[..., 0])
    bad_npz(tmp_path, "got float64", clips=READY.astype(np.float64))
    bad_npz(tmp_path, "got 5", clips=FRAMES, labels=np.array([0, 1, 0, 1, 0]))
    bad_npz(tmp_path, r"in 0\.\.1, got 2 for clip 2", clips=FRAMES, labels=np.arange(6))
    bad_npz(tmp_path, "names must be a list of strings", clips=FRAMES, names=np.arange(6))
    bad_npz(tmp_path, "clip 0 holds NaN", clips=READY * np.float32(np.nan))


def npy_header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (npy_header("(1000000000000, 2, 4, 5, 3)"), "the header promises 120000000000000 bytes"),
        (npy_header("(-1, 2, 4, 5, 3)"), "the header promises -120 bytes"),
        (npy_header("(True, 2)", "<V"), "clips"),
        (b"\x93NUMPY\x09\x00", "version"),
        (b"\x93NUMPY\x01\x00\xff\xff", "damaged"),
        (b"nonsense", "damaged"),
        (b"", "damaged"),
    ],
)
def test_npz_with_a_lying_header(tmp_path: Path, member: bytes, reason: str) -> None:
    path = tmp_path / "clips.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clips.npy", member)
    with pytest.raises(InputError, match=reason):
        load_clips(path, SPEC)


def test_bombs_are_refused_before_they_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clips.npz"
    np.savez_compressed(path, clips=np.zeros((20_000, 2, 4, 5, 3), np.uint8))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    with pytest.raises(InputError, match="clips may take at most 1 MiB"):
        load_clips(path, SPEC)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(10_001):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(InputError, match="at most 10000 entries, got 10001"):
        load_clips(path, SPEC)


@pytest.mark.parametrize("name", ["clips.npz", "clips.pt"])
def test_damaged_archives_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez_compressed(path, clips=FRAMES, labels=np.arange(6))
    else:
        torch.save({"clips": torch.from_numpy(FRAMES), "labels": torch.arange(6)}, path)
    original = path.read_bytes()
    random = np.random.RandomState(0)
    contents = [original[: len(original) * part // 16] for part in range(16)]
    for _ in range(150):
        content = bytearray(original)
        for position in random.randint(0, len(content), 3):
            content[position] = random.randint(256)
        contents.append(bytes(content))
    for content in contents:
        path.write_bytes(content)
        with suppress(InputError):
            assert load_clips(path, SPEC).data.shape[1:] == (2, 4, 5, 3)


def test_pt(tmp_path: Path) -> None:
    path = tmp_path / "clips.pt"
    torch.save(
        {"clips": torch.from_numpy(FRAMES), "labels": [5, 4, 3, 2, 1, 0], "names": list("abcdef")},
        path,
    )
    clips = load_clips(path, SPEC)
    assert clips.names == tuple("abcdef")
    assert clips.labels == (5, 4, 3, 2, 1, 0)
    torch.save({"clips": torch.from_numpy(READY), "labels": torch.arange(6)}, path)
    ready = load_clips(path, SPEC)
    assert ready.labels == (0, 1, 2, 3, 4, 5)
    torch.save(torch.from_numpy(READY), path)
    assert load_clips(path, SPEC).digest == ready.digest


def bad_pt(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "clips.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match=reason) as caught:
        load_clips(path, SPEC)
    assert str(caught.value).startswith(f"{path}: ")


def test_pt_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = torch.from_numpy(FRAMES)
    bad_pt(tmp_path, Payload(), "plain tensors")
    (tmp_path / "clips.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="plain tensors"):
        load_clips(tmp_path / "clips.pt", SPEC)
    assert not (tmp_path / "executed").exists()
    bad_pt(tmp_path, [1, 2], "must hold a tensor")
    bad_pt(tmp_path, {"clip": frames}, "must hold a tensor")
    bad_pt(tmp_path, {"clips": frames, "label": [1]}, "unknown entry 'label'")
    bad_pt(tmp_path, {"clips": frames, "names": [1] * 6}, "names must be a list of strings")
    bad_pt(tmp_path, {"clips": frames, "labels": "abcdef"}, "labels must be integers")
    bad_pt(tmp_path, {"clips": frames, "labels": [[1], [1, 2]]}, "labels must be integers")
    bad_pt(tmp_path, frames.double(), r"got torch\.float64")
    bad_pt(tmp_path, frames[:, :1], r"got uint8 of shape \[6, 1, 4, 5, 3\]")
    # One stored element that claims to be 8 TB.
    bad_pt(tmp_path, torch.zeros(1).expand(10**12, 2), "the tensor may take at most")


def pairs() -> Iterator[tuple[torch.Tensor, int]]:
    for index in range(6):
        yield torch.from_numpy(FRAMES[index]), 5 - index


def test_iterables(tmp_path: Path) -> None:
    expected = Clips.from_frames(FRAMES, SPEC).digest
    assert load_clips(list(FRAMES), SPEC).digest == expected
    assert load_clips(FRAMES, SPEC).digest == expected
    assert load_clips(torch.from_numpy(FRAMES), SPEC).digest == expected
    labelled = load_clips(pairs(), SPEC)
    assert labelled.digest == expected
    assert labelled.labels == (5, 4, 3, 2, 1, 0)
    assert load_clips(pairs(), SPEC, limit=2).labels == (5, 4)
    assert load_clips(labelled, SPEC) is labelled
    scalars = [(clip, np.int64(1)) for clip in READY] + [(READY[0], torch.tensor(1))]
    assert load_clips(scalars, SPEC).labels == (1,) * 7
    trained = torch.from_numpy(READY).requires_grad_()
    assert np.array_equal(load_clips(iter(trained), SPEC)[0], READY[0])


def test_an_endless_iterable_needs_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> Iterator[npt.NDArray[np.uint8]]:
        while True:
            yield FRAMES[0]

    assert len(load_clips(forever(), SPEC, limit=9)) == 9
    monkeypatch.setattr(archives, "MAX_BYTES", 2**16)
    with pytest.raises(InputError, match="use fewer clips"):
        load_clips(forever(), SPEC)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "the list of clips must give at least one"),
        ([FRAMES], r"got uint8 of shape \[1, 6, 2, 4, 5, 3\]"),
        ([FRAMES[0], READY[0]], "clips must be alike: clip 0 is uint8"),
        ([FRAMES[0], (FRAMES[0], 1)], "either every clip has one or none, got 1 of 2"),
        ([(FRAMES[0], 1.5)], "the label of clip 0 must be an integer, got float"),
        ([(FRAMES[0], 1, 2)], "or a .clip, label. pair, got 3 items"),
        ([(FRAMES[0], -1)], r"labels must be in 0\.\.1, got -1"),
        ([(FRAMES[0], 2)], r"labels must be in 0\.\.1, got 2"),
        (["clip"], "clip 0 must be an array or a tensor, got str"),
        ([torch.zeros(2, dtype=torch.bfloat16)], "got torch.bfloat16"),
        ({"clips": FRAMES}, "cannot be read from a dict"),
        (b"clips.npz", "cannot be read from a bytes"),
        (3, "cannot be read from a int"),
        (READY.astype(np.float64), "got float64"),
    ],
)
def test_python_objects_that_do_not_fit(source: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_clips(source, SPEC, label_names=["a", "b"])


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        load_clips(FRAMES, SPEC, limit=0)
