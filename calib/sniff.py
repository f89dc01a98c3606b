"""Which container a file is, from its first bytes, and how its name is shown.

Playlists and lists of files are not among the containers: they make a decoder open other files.
"""

from __future__ import annotations

import stat
from pathlib import Path

from vcompress.spec.errors import InputError

__all__ = ["VIDEO_SUFFIXES", "printable", "sniff_demuxer"]

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".ogg", ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip

_ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_MAGIC = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogg"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
)


def sniff_demuxer(path: Path) -> str:
    """FFmpeg's name of the demuxer for this file.

    Raises:
        InputError: not a regular file, empty, or none of the containers that are read.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        message = "not a regular file"
        raise InputError(message)
    with path.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        message = "the file is empty"
        raise InputError(message)
    if head[4:8] in _ISO_BOXES:
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for packet_bytes, offset in ((188, 0), (192, 4)):
        if len(head) > 2 * packet_bytes and set(head[offset : 3 * packet_bytes : packet_bytes]) == {
            0x47
        }:
            return "mpegts"
    for magic, demuxer in _MAGIC:
        if head.startswith(magic):
            return demuxer
    message = (
        f"not a video: the content begins with {head[:8]!r}, which is none of MP4/MOV, "
        "Matroska/WebM, AVI, MPEG-TS, MPEG-PS, FLV, Ogg, ASF/WMV, GIF; playlists are not followed"
    )
    raise InputError(message)


def printable(name: object) -> str:
    """`name` on one line: control characters and undecodable bytes are escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in str(name)
    )
