"""ONNX -> TensorRT engine, with TensorRT-RTX or the enterprise TensorRT behind one interface.

TensorRT-RTX builds for any of its compute capabilities on a machine with no GPU; the enterprise
TensorRT builds only on the GPU that it builds for. Precision stands in the graph: there are no
precision flags. The work is done by `vcompress.export.engine_worker` in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vcompress.export import engine_worker
from vcompress.export.engine_errors import build_error
from vcompress.export.shape_profiles import ShapeProfile, complete_profiles
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = [
    "EngineFacts",
    "ShapeProfile",
    "TensorFacts",
    "build_command",
    "build_engine",
    "library_version",
    "own_sm",
    "supported_sms",
]

OnProgress = Callable[[str, float], None]
_NAMES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
_INSTALL = {
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt": "pip install 'vcompress-ai[tensorrt]'",
}


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """Name, dtype ("float", "half", "int8" ...) and shape (-1: dynamic) of an input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What was built.

    Attributes:
        runtime: "tensorrt-rtx" or "tensorrt".
        version: of that library; an engine runs only in the version that built it.
        sm: compute capability that the engine is for.
        seconds: parsing and building.
        num_bytes: size of the engine file.
        num_layers: layers of the network before fusion.
        inputs: as the engine has them.
        outputs: as the engine has them.
        profiles: shape profiles of the dynamic inputs.
        warnings: what the builder warned of.
    """

    runtime: str
    version: str
    sm: str
    seconds: float
    num_bytes: int
    num_layers: int
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    profiles: Mapping[str, ShapeProfile]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for manifest and report."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def library_version(runtime: str = "tensorrt-rtx") -> str | None:
    """Version of the library behind `runtime`, or None where it is not installed."""
    try:
        return str(engine_worker.load_library(runtime).__version__)
    except ImportError:
        return None


def supported_sms(runtime: str = "tensorrt-rtx") -> tuple[str, ...]:
    """Compute capabilities for which this machine can build; empty where the library is missing."""
    try:
        library = engine_worker.load_library(runtime)
    except ImportError:
        return ()
    return engine_worker.compute_capabilities(library) if runtime == "tensorrt-rtx" else own_sm()


def build_command(
    onnx_path: Path, engine_path: Path, shape_profiles: Mapping[str, ShapeProfile] | None = None
) -> str:
    """The command that builds the engine on another machine, where TensorRT is installed."""
    profiles = complete_profiles(onnx_path, shape_profiles)
    words = ["trtexec", f"--onnx={onnx_path.name}", f"--saveEngine={engine_path.name}"]
    for flag, which in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
        shapes = (
            f"{name}:{'x'.join(map(str, getattr(profile, which)))}"
            for name, profile in profiles.items()
        )
        if profiles:
            words.append(f"--{flag}Shapes={','.join(shapes)}")
    return shlex.join(words)


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    runtime: str = "tensorrt-rtx",
    sm: str = "120",
    shape_profiles: Mapping[str, ShapeProfile] | None = None,
    on_progress: OnProgress | None = None,
) -> EngineFacts:
    """Build an engine for compute capability `sm` and write it to `engine_path` as a whole.

    Args:
        onnx_path: the model; weights in files beside it are found.
        engine_path: written under another name first, so it is never half there.
        runtime: "tensorrt-rtx" or "tensorrt".
        sm: compute capability of the GPU that will run the engine, "120" for 12.0.
        shape_profiles: by input name; a dynamic input without one gets a batch of 1 to 8, tuned
            for 1.
        on_progress: called with the builder's phase and the fraction of it that is done.

    Raises:
        InputError: no such file, unknown runtime, or profiles that do not fit the inputs.
        MissingCapabilityError: the library is missing, or cannot build for `sm` on this machine.
        BuildError: the graph could not be parsed or built; names the node where that is known.
    """
    if runtime not in engine_worker.RUNTIMES:
        message = f"unknown runtime {runtime!r}; choose one of: {', '.join(engine_worker.RUNTIMES)}"
        raise InputError(message)
    profiles = complete_profiles(onnx_path, shape_profiles)
    _require_builder(runtime, sm, build_command(onnx_path, engine_path, profiles))
    temporary = engine_path.with_name(f".{engine_path.name}.tmp-{os.getpid()}")
    request = {
        "runtime": runtime,
        "onnx": str(onnx_path),
        "engine": str(temporary),
        "sm": sm,
        "profiles": {
            name: (profile.minimum, profile.optimum, profile.maximum)
            for name, profile in profiles.items()
        },
    }
    what = f"{_NAMES[runtime]} {library_version(runtime)} for SM {sm}: {onnx_path.name}"
    try:
        done = _run_worker(request, what, on_progress)
        temporary.replace(engine_path)
    finally:
        temporary.unlink(missing_ok=True)
    return EngineFacts(
        runtime=runtime,
        version=done["version"],
        sm=sm,
        seconds=done["seconds"],
        num_bytes=engine_path.stat().st_size,
        num_layers=done["num_layers"],
        inputs=_tensor_facts(done["inputs"]),
        outputs=_tensor_facts(done["outputs"]),
        profiles=profiles,
        warnings=tuple(done["messages"]),
    )


def _tensor_facts(tensors: list[dict[str, Any]]) -> tuple[TensorFacts, ...]:
    return tuple(
        TensorFacts(name=each["name"], dtype=each["dtype"], shape=tuple(each["shape"]))
        for each in tensors
    )


def own_sm() -> tuple[str, ...]:
    """Compute capability of the GPU of this machine; empty where there is none.

    Asked of torch, or of cuda-bindings on a device that has no torch.
    """
    try:
        import torch
    except ImportError:
        return _sm_without_torch()
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    return (f"{major}{minor}",)


def _sm_without_torch() -> tuple[str, ...]:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return ()
    error, facts = runtime.cudaGetDeviceProperties(0)
    if error != runtime.cudaError_t.cudaSuccess:
        return ()
    return (f"{facts.major}{facts.minor}",)


def _require_builder(runtime: str, sm: str, elsewhere: str) -> None:
    """Raise unless this machine can build for `sm`; the message says where it can be built."""
    name = _NAMES[runtime]
    try:
        engine_worker.load_library(runtime)
    except ImportError as error:
        message = (
            f"{name} is not installed ({error}): {_INSTALL[runtime]}; or build on a machine that "
            f"has it and a GPU of SM {sm}: {elsewhere}"
        )
        raise MissingCapabilityError(message) from error
    known = supported_sms(runtime)
    if sm not in known:
        here = f"SM {', '.join(known)}" if known else "no GPU of this machine"
        message = (
            f"{name} {library_version(runtime)} builds for {here} here, not for SM {sm}; build "
            f"with TensorRT on a machine with such a GPU: {elsewhere}"
        )
        raise MissingCapabilityError(message)


def _run_worker(
    request: dict[str, Any], what: str, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Run the worker to its end and return its event "done"."""
    # By its path, as it needs nothing of ours; -P: no file beside it stands in for a library.
    command = [sys.executable, "-P", engine_worker.__file__]
    last: dict[str, Any] = {"event": "started"}
    node = ""
    with (
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8"
        ) as process,
    ):
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            # A worker that died at its start says why on standard error.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                last = json.loads(line)
                if last["event"] == "node":
                    node = f"{last['name']} ({last['operator']})"
                elif last["event"] == "parsed":
                    node = "none: all nodes were parsed"
                elif last["event"] == "progress" and on_progress is not None:
                    on_progress(last["phase"], last["fraction"])
            process.wait()
        finally:
            # Not only when it has ended: an interrupt must not leave a builder behind.
            process.kill()
        stderr.seek(0)
        if last["event"] == "done" and process.returncode == 0:
            return last
        raise build_error(
            what, last, ended=_ending(process.returncode), node=node, output=stderr.read()
        )


def _ending(returncode: int) -> str:
    """How the process ended, in words."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"signal {-returncode} ({signal.strsignal(-returncode)})"
