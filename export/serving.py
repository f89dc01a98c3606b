"""Folders that other people's servers take: a Triton model repository, a DeepStream configuration.

Both are text made from the manifest, beside the graph.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from vcompress.export import deepstream, triton
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

if TYPE_CHECKING:
    # It imports torch, which a machine that only serves does without.
    from vcompress.export.cached_graph import CachedFacts

__all__ = ["SERVERS", "export_for_server"]

SERVERS: Mapping[str, Callable[[Artifact, Path, int], None]] = MappingProxyType(
    {"triton": triton.write_repository, "deepstream": deepstream.write_configuration}
)


def export_for_server(
    path: Path, output: Path, server: str, *, max_batch: int = 8, force: bool = False,
    cached: CachedFacts | None = None,
) -> tuple[Path, ...]:  # fmt: skip
    """Write what `server` takes; the files, relative to `output`.

    Args:
        path: an artifact.
        output: a folder that is not there, or is empty; for Triton the model repository.
        server: one of `SERVERS`.
        max_batch: clips in one run, where the graph leaves their number free.
        force: replace a folder that is already at `output`, if it was written by this function.
        cached: for Triton, the graph of a denoiser with its cache, in place of the artifact's.

    Raises:
        InputError: no artifact, an unknown server, a folder in the way, or a model that the server
            has no place for.
    """
    if server not in SERVERS:
        message = f"unknown server {server!r}; choose one of: {', '.join(SERVERS)}"
        raise InputError(message)
    artifact = Artifact.open(path, verify_hashes=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        folder = Path(name) / "made"
        folder.mkdir()
        if cached is not None:
            triton.write_cached(artifact, folder, cached)
        else:
            SERVERS[server](artifact, folder, max_batch)
        made = tuple(
            sorted(each.relative_to(folder) for each in folder.rglob("*") if each.is_file())
        )
        _make_room(output, made, force=force)
        folder.chmod(0o755)
        folder.rename(output)
    return made


def _make_room(output: Path, made: tuple[Path, ...], *, force: bool) -> None:
    if not output.exists():
        return
    if output.is_dir():
        there = [each.relative_to(output) for each in output.rglob("*") if each.is_file()]
        foreign = [str(each) for each in there if each not in made]
        if not there or (force and not foreign):
            shutil.rmtree(output)
            return
        if force:
            message = f"{output} holds other files: {', '.join(foreign[:3])}; move them first"
            raise InputError(message)
    message = f"{output} is there already; replace it with --force, or choose another output"
    raise InputError(message)
