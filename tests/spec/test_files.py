"""Single files: refused before the work, and never half written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from vcompress.spec.errors import InputError
from vcompress.spec.files import check_file, replace_file


def test_the_old_file_stays_when_writing_fails(tmp_path: Path) -> None:
    replace_file(tmp_path / "plan.json", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(InputError, match=r"plan\.json cannot be written: File too large"):
            replace_file(tmp_path / "plan.json", b"new and far too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("plan.json", b"old")
    ]


def test_text_is_utf_8(tmp_path: Path) -> None:
    replace_file(tmp_path / "names.txt", "Käse\n")
    assert (tmp_path / "names.txt").read_bytes() == b"K\xc3\xa4se\n"


def test_what_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    check_file(tmp_path / "new.json")
    (tmp_path / "there.json").touch()
    check_file(tmp_path / "there.json")
    with pytest.raises(InputError, match="is a folder; choose another --output"):
        check_file(tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*none; choose another --junit"):
        check_file(tmp_path / "none" / "x.xml", "--junit")
