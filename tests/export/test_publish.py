from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vcompress.export import publish
from vcompress.export.publish import (
    check_output,
    staged_directory,
    write_manifest,
)
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

MANIFEST: dict[str, Any] = {
    "schema": 1, "vcompress": "0.1.0", "created": "2026-11-22T10:00:00Z", "name": "tiny",
    "source": {}, "task": "classify", "inputs": [], "outputs": [], "clip": {}, "precision": {},
    "requires": {},
}  # fmt: skip
FILES = ("model.onnx", "plan.json", "golden/inputs.npz")


def fill(folder: Path, word: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{word} {name}")
    write_manifest(folder, MANIFEST, roles={name: name.split(".")[0] for name in FILES})


def publish_as(
    target: Path, word: str, *, force: bool = False, error: BaseException | None = None
) -> None:
    with staged_directory(target, force=force) as folder:
        fill(folder, word)
        if error is not None:
            raise error


def content(target: Path) -> str | None:
    """The word that all files of a complete artifact hold; None where there is no target."""
    if not target.exists():
        return None
    artifact = Artifact.open(target, verify_hashes=True)
    words = {(artifact.path / name).read_text().split()[0] for name in FILES}
    assert len(words) == 1, "files of two artifacts are mixed"
    return words.pop()


def test_publishes_a_complete_artifact_and_leaves_nothing_else(tmp_path: Path) -> None:
    publish_as(tmp_path / "deep" / "out", "new")
    assert content(tmp_path / "deep" / "out") == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    artifact = Artifact.open(tmp_path / "deep" / "out")
    assert artifact.file("model") == tmp_path / "deep" / "out" / "model.onnx"


def test_manifest_names_every_file_with_size_digest_and_facts(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("abc")
    about = {"model.onnx": {"opset": 20}}
    write_manifest(tmp_path, MANIFEST, roles={"model.onnx": "onnx"}, about=about)
    (entry,) = json.loads((tmp_path / "manifest.json").read_text())["files"]
    # sha256 of "abc", from FIPS 180-2, appendix B.1.
    assert entry == {
        "path": "model.onnx", "role": "onnx", "bytes": 3, "about": {"opset": 20},
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }  # fmt: skip


def test_a_block_without_manifest_publishes_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"no manifest\.json"),
        staged_directory(tmp_path / "out") as folder,
    ):
        (folder / "model.onnx").write_text("half")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(143)])
def test_an_exception_leaves_the_target_as_it_was(tmp_path: Path, error: BaseException) -> None:
    publish_as(tmp_path / "out", "old")
    with pytest.raises(type(error)):
        publish_as(tmp_path / "out", "new", force=True, error=error)
    assert content(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_an_artifact_and_nothing_else_does(tmp_path: Path) -> None:
    publish_as(tmp_path / "out", "old")
    with pytest.raises(InputError, match="is an artifact already; replace it with --force"):
        publish_as(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "old"
    publish_as(tmp_path / "out", "new", force=True)
    assert content(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_edited_artifact_can_be_replaced(tmp_path: Path) -> None:
    publish_as(tmp_path / "out", "old")
    (tmp_path / "out" / "plan.json").write_text("edited by hand, longer than before")
    publish_as(tmp_path / "out", "new", force=True)
    assert content(tmp_path / "out") == "new"


def test_files_of_the_user_are_never_deleted(tmp_path: Path) -> None:
    publish_as(tmp_path / "out", "old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no part of the artifact: notes\.txt"):
        publish_as(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_artifact_is_refused(tmp_path: Path, force: bool) -> None:
    publish_as(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "holiday.mp4").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    cases = {
        "link": "is a symbolic link", "file": "is a file", "folder": "is not an artifact",
        "broken": "is not an artifact", "file/below": "is a file",
    }  # fmt: skip
    for name, reason in cases.items():
        with pytest.raises(InputError, match=reason):
            check_output(tmp_path / name, force=force)
        with pytest.raises(InputError, match=reason):
            publish_as(tmp_path / name, "new", force=force)
    assert content(tmp_path / "real") == "old"
    with pytest.raises(InputError, match="is a mount point"):
        check_output(Path("/"), force=force)


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")
    publish_as(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MiB free, .* MiB are needed"):
        check_output(tmp_path / "out", bytes_needed=2**62)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root may write everywhere, so give up its rights for the test."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.mark.usefixtures("ordinary_user")
def test_a_read_only_parent_is_said_before_the_work() -> None:
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        parent.chmod(0o555)
        for target in (parent / "out", parent / "new" / "out"):
            with pytest.raises(InputError, match=r"cannot write to .*Permission denied"):
                check_output(target)
            with pytest.raises(InputError, match=r"cannot write to .*Permission denied"):
                publish_as(target, "new")
        parent.chmod(0o755)


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    publish_as(tmp_path / "out", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses a write beyond this size just as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with (
            pytest.raises(InputError, match="no space left while writing") as caught,
            staged_directory(tmp_path / "out", force=True) as folder,
        ):
            (folder / "model.onnx").write_bytes(bytes(2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert content(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_as_readable_as_the_manifest(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out") as folder:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        (folder / "model.onnx").chmod(0o600)
        (folder / "plan.json").chmod(0o700)
        write_manifest(folder, MANIFEST, roles=dict.fromkeys(FILES, "x"))
    modes = {
        name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode)
        for name in ("manifest.json", "model.onnx", "plan.json")
    }
    assert modes["model.onnx"] == modes["manifest.json"] & ~0o111
    assert modes["plan.json"] & 0o100


WRITER = f"""
import signal, sys, time
# A shell that runs the tests in the background lets them ignore the interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_publish import fill
from vcompress.export.publish import staged_directory
with staged_directory(Path(sys.argv[1]), force=True) as folder:
    fill(folder, "new")
    print("writing", flush=True)
    time.sleep(60)
"""


def writer(target: Path) -> subprocess.Popen[str]:
    """A process that has written everything and not published yet."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_stopped_process_cleans_up(tmp_path: Path, number: signal.Signals, code: int) -> None:
    publish_as(tmp_path / "out", "old")
    with writer(tmp_path / "out") as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == code
    assert content(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_writer_at_a_time_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    publish_as(tmp_path / "out", "old")
    foreign = tmp_path / ".out.tmp-notes"
    foreign.mkdir()
    with writer(tmp_path / "out") as process:
        with pytest.raises(InputError, match=f"process {process.pid} is writing"):
            publish_as(tmp_path / "out", "mine", force=True)
        process.kill()
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 4, left  # out, notes, the temporary directory and the lock
    publish_as(tmp_path / "out", "mine", force=True)
    assert content(tmp_path / "out") == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", foreign.name}


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            publish_as(tmp_path / "out", "second")
        except InputError as error:
            refused.append(str(error))

    with staged_directory(tmp_path / "out") as folder:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        fill(folder, "first")
    assert content(tmp_path / "out") == "first"
    assert len(refused) == 1


def crash_before(step: int, folder: Path) -> None:
    """End this process just before its `step`-th operation on a path below `folder`."""
    watched = {
        "ctypes.dlsym", "open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
        "os.truncate", "shutil.rmtree",
    }  # fmt: skip
    remaining = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining
        if event not in watched:
            return
        path = arguments[0]
        here = isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder))
        # Inside a tree that is being removed, names are relative to an open directory.
        if here or event == "ctypes.dlsym" or event in ("os.remove", "os.rmdir"):
            remaining -= 1
            if remaining == 0:
                os._exit(137)

    sys.addaudithook(hook)


def enumerate_crashes(folder: Path, *, replace: bool) -> int:
    """Crash at every step in turn; return how many steps there were."""
    # What a process wrote outlives it; fsync is for the loss of power, and slow.
    os.fsync = lambda descriptor: None
    target = folder / "out"
    for step in range(1, 1000):
        if target.exists() and not replace:
            for path in sorted(target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.rmdir()
        elif replace:
            publish_as(target, "old", force=target.exists())
        child = os.fork()
        if child == 0:
            crash_before(step, folder)
            publish_as(target, "new", force=replace)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 137)
        allowed = {"new", "old"} if replace else {"new", None}
        if publish._renameat2 is without_flags:
            allowed |= {None}  # between its two renames; the next run recovers, see below
        before = content(target)
        assert before in allowed, (step, before)
        if before is None and replace:
            with pytest.raises(InputError, match="already"):
                publish_as(target, "new")  # recovers the old artifact, then sees it
            assert content(target) == "old"
        publish_as(target, "again", force=True)
        assert content(target) == "again"
        assert [path.name for path in folder.iterdir()] == ["out"], step
        if code == 0:
            return step
    message = "the program never reached its end"
    raise AssertionError(message)


def without_flags(source: Path, destination: Path, flags: int) -> bool:
    """Stands in for a system whose rename has no flags."""
    return False


@pytest.mark.parametrize("system", ["linux", "other"])
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_a_crash_at_any_step_leaves_old_or_new(tmp_path: Path, system: str, replace: bool) -> None:
    # In a fresh process, which has no threads and may fork.
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_publish as here\nfrom pathlib import Path\n"
        f"if {system != 'linux'}: here.publish._renameat2 = here.without_flags\n"
        f"print(here.enumerate_crashes(Path({str(tmp_path)!r}), replace={replace}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_preflight_takes_milliseconds(tmp_path: Path) -> None:
    # Processor time: the wall clock depends on what else the machine and its disk do.
    started = time.process_time()
    for _ in range(20):
        check_output(tmp_path / "out")
    assert (time.process_time() - started) / 20 < 0.1
