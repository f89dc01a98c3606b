"""A model in its runtime, whatever that is: one way to open it and to ask what it really does.

NumPy and the package of one runtime are all that is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from vcompress.export.artifact_files import graph_file
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import InputError

__all__ = ["RUNTIMES", "Session", "open_graph"]

Array = npt.NDArray[Any]


class Session(Protocol):
    """A loaded model, whatever runtime it is in."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What really computes, read back from the runtime."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs."""

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input; None where a size is dynamic."""

    def run_named(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, for all inputs by name."""

    def kernels(self) -> dict[str, int]:
        """What the runtime really executes, counted."""


def _onnxruntime(artifact: Artifact, provider: str | None, threads: int | None) -> Session:
    from vcompress.export.runtime import open_session

    providers = () if provider is None else (provider,)
    return open_session(
        graph_file(artifact, "onnx"),
        providers=providers or ("CPUExecutionProvider",),
        threads=threads,
    )


def _onnxruntime_cuda(artifact: Artifact, provider: str | None, threads: int | None) -> Session:
    from vcompress.export.runtime import open_session

    path = artifact.file("cuda-onnx")
    if path is None:
        message = (
            f"{artifact.path} has no graph for ONNX Runtime on CUDA; add it: vcompress export "
            f"{artifact.path} --runtime onnxruntime-cuda"
        )
        raise InputError(message)
    return open_session(path, providers=(provider or "CUDAExecutionProvider",), threads=threads)


def _openvino(artifact: Artifact, provider: str | None, threads: int | None) -> Session:
    from vcompress.export.openvino_runtime import open_openvino

    # An artifact without a file of its own for OpenVINO has one that any runtime takes.
    path = artifact.file("openvino-onnx") or graph_file(artifact, "onnx")
    return open_openvino(path, device=provider or "CPU", threads=threads)


def _engine(runtime: str) -> Callable[[Artifact, str | None, int | None], Session]:
    def opened(artifact: Artifact, provider: str | None, _threads: int | None) -> Session:
        from vcompress.export.engine_runtime import open_engine

        return open_engine(artifact, runtime, provider)

    return opened


_OPENERS: Mapping[str, Callable[[Artifact, str | None, int | None], Session]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "openvino": _openvino,
    "tensorrt-rtx": _engine("tensorrt-rtx"),
    "tensorrt": _engine("tensorrt"),
}
RUNTIMES = tuple(_OPENERS)


def open_graph(
    artifact: Artifact, runtime: str, *, provider: str | None = None, threads: int | None = None
) -> Session:
    """The graph of `artifact` for `runtime`, one of `RUNTIMES`; see `deployed.open_deployed`."""
    if runtime not in _OPENERS:
        message = f"unknown runtime {runtime!r} to run in; choose one of: {', '.join(RUNTIMES)}"
        raise InputError(message)
    return _OPENERS[runtime](artifact, provider, threads)
