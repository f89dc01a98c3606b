"""What `vcompress export` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vcompress.export.extend import Extension

__all__ = ["print_extension", "print_server"]


def print_extension(made: Extension, *, as_json: bool) -> None:
    """What was made for a runtime, or for another input."""
    if as_json:
        print(json.dumps({"schema": 1, "exit_code": 0, **made.as_dict()}, allow_nan=False))
        return
    if made.formats:
        listed = ", ".join(f"{count} {name}" for name, count in made.formats.items())
        print(f"layers   {listed}, read back from the graph")
    if made.kernels:
        listed = ", ".join(f"{count} {name}" for name, count in made.kernels.items())
        print(f"kernels  {listed}")
    if made.golden_relative_l2 is not None:
        print(f"golden   relative L2 {made.golden_relative_l2:.1e} in {made.runtime}")
    if "seconds" in made.facts:
        facts = made.facts
        print(
            f"engine   {facts['runtime']} {facts['version']} for SM {facts['sm']}, "
            f"{facts['num_bytes'] / 2**20:.1f} MiB in {facts['seconds']:.1f} s, not "
            "run here"
        )
    word = "wrote" if made.written else "there"
    print(f"{word:<8} {made.path / made.file}")
    if not made.facts.get("seconds"):
        print(f"next     vcompress run {made.path} VIDEO --runtime {made.runtime}")


def print_server(output: Path, server: str, files: tuple[Path, ...], *, as_json: bool) -> None:
    """What was made for a server."""
    if as_json:
        names = [str(name) for name in files]
        print(json.dumps({"schema": 1, "exit_code": 0, "output": str(output), "files": names}))
        return
    for name in files:
        print(f"wrote    {output / name}")
    if server == "triton":
        print(f"next     tritonserver --model-repository={output}")
    else:
        print("next     nvdspreprocess config-file=config_preprocess.txt ! nvinfer")
        print("         config-file-path=config_infer.txt input-tensor-meta=1")
