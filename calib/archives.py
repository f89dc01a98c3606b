"""Arrays of clips from `.npz` and `.pt` files, read as plain data and never as objects.

Sizes are checked against the headers before anything is read, so that neither a small archive
that unpacks to terabytes nor a header that promises them can exhaust the memory.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from vcompress.calib.sniff import printable
from vcompress.spec.errors import InputError
from vcompress.spec.strict_json import nearest

__all__ = ["MAX_BYTES", "Arrays", "check_bytes", "read_npz", "read_pt", "tensor_to_array"]

MAX_BYTES = 4 * 2**30  # of the clips held in memory at once, whatever they come from
_MAX_ZIP_ENTRIES = 10_000
_MAX_ZIP_ENTRY_BYTES = 1024  # of the directory, an entry
_ZIP_TAIL_BYTES = 22 + 65535 + 20 + 56  # the end records with the longest comment
_KEYS = ("clips", "labels", "names")


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Clips `[N, ...]` as they stand in a file, with labels `[N]` and names where it has them."""

    clips: npt.NDArray[Any]
    labels: Sequence[int] | npt.NDArray[Any] | None
    names: tuple[str, ...] | None


def check_bytes(num_bytes: int, what: str) -> None:
    """Refuse more clips than are held in memory at once."""
    if num_bytes > MAX_BYTES:
        message = (
            f"{what} may take at most {MAX_BYTES // 2**20} MiB in memory, got "
            f"{num_bytes // 2**20} MiB; use fewer clips"
        )
        raise InputError(message)


def tensor_to_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A float32, uint8 or int64 tensor as an array; the size is checked before a copy is made."""
    if tensor.layout != torch.strided or tensor.dtype not in (
        torch.uint8, torch.float32, torch.int32, torch.int64,
    ):  # fmt: skip
        message = (
            f"tensors must be dense and uint8 or float32 (labels: int64), got {tensor.dtype}, "
            f"{tensor.layout}; convert them"
        )
        raise InputError(message)
    check_bytes(tensor.numel() * tensor.element_size(), "the tensor")
    array: npt.NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def read_npz(path: Path) -> Arrays:
    """Read `clips` and, where present, `labels` and `names` from a NumPy archive.

    Raises:
        InputError: not a NumPy archive, object arrays, unknown or missing keys, or too large.
    """
    check_bytes(path.stat().st_size, "the file")
    _check_zip_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_keys(members)
            arrays: dict[str, npt.NDArray[Any]] = {}
            for key, info in members.items():
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    message = f"{key}: unknown compression; write it with numpy.savez"
                    raise InputError(message)
                with archive.open(info) as stream:
                    arrays[key] = _read_npy(stream, info.file_size, key)
        names = arrays["names"].tolist() if "names" in arrays else None
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        message = f"damaged NumPy archive ({printable(error)}); write it with numpy.savez"
        raise InputError(message) from error
    return Arrays(clips=arrays["clips"], labels=arrays.get("labels"), names=_checked_names(names))


def read_pt(path: Path) -> Arrays:
    """Read a tensor of clips, or a dictionary with `clips`, `labels` and `names`, from torch.save.

    Raises:
        InputError: anything but tensors and strings inside, unknown or missing keys, too large.
    """
    check_bytes(path.stat().st_size, "the file")
    try:
        if zipfile.is_zipfile(path):
            _check_zip_directory(path)
            with zipfile.ZipFile(path) as archive:
                num_bytes = sum(info.file_size for info in archive.infolist())
            check_bytes(num_bytes, "the content")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch raises nearly any type on a damaged or hostile file
        message = (
            "cannot be read as plain tensors; write it with "
            "torch.save({'clips': tensor, 'labels': tensor}, path)"
        )
        raise InputError(message) from error
    if isinstance(data, torch.Tensor):
        data = {"clips": data}
    if not isinstance(data, dict) or not isinstance(data.get("clips"), torch.Tensor):
        message = "must hold a tensor, or a dictionary with a tensor under 'clips'"
        raise InputError(message)
    _check_keys(data)
    labels = data.get("labels")
    if isinstance(labels, torch.Tensor):
        labels = tensor_to_array(labels)
    return Arrays(
        clips=tensor_to_array(data["clips"]),
        labels=labels,
        names=_checked_names(data.get("names")),
    )


def _checked_names(names: object) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        message = f"names must be a list of strings, got {printable(repr(names)[:60])}"
        raise InputError(message)
    return tuple(printable(name) for name in names)


def _check_keys(data: Mapping[Any, object] | Iterable[Any]) -> None:
    keys = [printable(key) for key in data]
    for key in keys:
        if key not in _KEYS:
            message = f"unknown entry {key!r}{nearest(key, _KEYS)}; known are {', '.join(_KEYS)}"
            raise InputError(message)
    if "clips" not in keys:
        message = "the entry 'clips' is missing"
        raise InputError(message)


def _check_zip_directory(path: Path) -> None:
    """Refuse a ZIP file of very many entries before its directory is read into memory.

    Every end record in the tail is believed, so that it does not matter which one a reader takes.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - _ZIP_TAIL_BYTES))
        tail = stream.read()
    sizes: list[tuple[int, int]] = []
    for signature, layout, offset in ((b"PK\x05\x06", "<HI", 10), (b"PK\x06\x06", "<QQ", 32)):
        position = tail.find(signature)
        while position >= 0 and len(tail) >= position + offset + struct.calcsize(layout):
            num_entries, directory_bytes = struct.unpack_from(layout, tail, position + offset)
            sizes.append((num_entries, directory_bytes))
            position = tail.find(signature, position + 4)
    if not sizes or (b"PK\x06\x07" in tail and b"PK\x06\x06" not in tail):
        message = "not a ZIP archive, or a damaged one; write it again"
        raise InputError(message)
    num_entries, directory_bytes = (max(column) for column in zip(*sizes, strict=True))
    if num_entries > _MAX_ZIP_ENTRIES or directory_bytes > _MAX_ZIP_ENTRY_BYTES * _MAX_ZIP_ENTRIES:
        message = f"an archive may have at most {_MAX_ZIP_ENTRIES} entries, got {num_entries}"
        raise InputError(message)


def _read_npy(stream: IO[bytes], file_bytes: int, key: str) -> npt.NDArray[Any]:
    """One array, whose header is believed only after its size was compared with the file's."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        message = f"{key}: version {version} of the NumPy format is not supported"
        raise InputError(message)
    if dtype.hasobject or dtype.fields is not None:
        message = f"{key} must hold plain numbers or strings, got {dtype}; objects are never loaded"
        raise InputError(message)
    num_bytes = dtype.itemsize
    for length in shape:
        num_bytes *= length
    if num_bytes < 0 or num_bytes > file_bytes:
        message = f"{key}: the header promises {num_bytes} bytes, the archive has {file_bytes}"
        raise InputError(message)
    check_bytes(num_bytes, key)
    content = stream.read(num_bytes)
    if len(content) != num_bytes:
        message = f"{key}: truncated, {len(content)} of {num_bytes} bytes are there"
        raise InputError(message)
    stream.read(1)  # at the end of the member zipfile compares the checksum
    array: npt.NDArray[Any] = np.frombuffer(content, dtype).reshape(
        shape, order="F" if fortran_order else "C"
    )
    return array.astype(dtype.newbyteorder("="), copy=False)
