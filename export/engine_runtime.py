"""Runs an engine of TensorRT-RTX or TensorRT on its GPU: NumPy arrays in, NumPy arrays out.

An engine is for one GPU, so of those in an artifact the one is taken that the GPU here loads.
TensorRT itself says what it takes and gives; memory of the GPU comes from NVIDIA's cuda-bindings.
All runs go through one stream, and arrays are copied there and back.
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.export.engine_worker import load_library
from vcompress.spec.artifact import Artifact
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

__all__ = ["LIBRARIES", "EngineSession", "open_engine"]

Array = npt.NDArray[Any]
# Runtime -> what the manifest calls it, and how to install it.
LIBRARIES: Mapping[str, tuple[str, str]] = {
    "tensorrt-rtx": ("TensorRT-RTX", "tensorrt-rtx-cu13"),
    "tensorrt": ("TensorRT", "'vcompress-ai[tensorrt]'"),
}
# What CUDA says where there is no driver, or no GPU.
_NO_GPU = ("driver version is insufficient", "no CUDA-capable device", "cudaError 35", "error 35")


def open_engine(artifact: Artifact, runtime: str, provider: str | None = None) -> EngineSession:
    """Load the engine of `artifact` that the GPU here takes.

    Args:
        artifact: it holds engines.
        runtime: a key of `LIBRARIES`.
        provider: number of the GPU, "0" by default.

    Raises:
        InputError: the artifact has no engine of this runtime, or the provider is no number.
        MissingCapabilityError: the library, cuda-bindings or a GPU is missing.
        BuildError: no engine loads on this GPU.
    """
    label, package = LIBRARIES[runtime]
    entries = [
        entry
        for entry in artifact.manifest["files"]
        if entry["role"] == "engine" and entry.get("about", {}).get("runtime") == label
    ]
    if not entries:
        message = (
            f"{artifact.path} has no engine of {label}; add one: vcompress export {artifact.path} "
            f"--runtime {runtime} --sm NN"
        )
        raise InputError(message)
    if not (provider or "0").isdecimal():
        message = f"the provider of {label} is the number of a GPU (0, 1 ...), got {provider!r}"
        raise InputError(message)
    try:
        library = load_library(runtime)
    except ImportError as error:
        message = f"{label} is not installed: pip install {package} on a machine with its GPU"
        raise MissingCapabilityError(message) from error
    log = _log(library)
    loaded = library.Runtime(log)
    for entry in entries:
        engine = loaded.deserialize_cuda_engine((artifact.path / entry["path"]).read_bytes())
        if engine is not None:
            return EngineSession(
                library, label, engine, log, name=entry["path"], device=int(provider or 0)
            )
    sms = " and ".join(f"SM {entry['about']['sm']}" for entry in entries)
    reason = next((line for line in log.messages if "rror" in line), "it does not say why")
    if any(words in line for line in log.messages for words in _NO_GPU):
        message = (
            f"{artifact.path} has engines for {sms}, and this machine has no NVIDIA GPU that "
            f"{label} sees; take the artifact to such a GPU, or run it with --runtime onnxruntime"
        )
        raise MissingCapabilityError(message)
    message = (
        f"{label} {library.__version__} loads none of the engines for {sms} on this GPU "
        f"({reason}); build one here: vcompress export {artifact.path} --runtime {runtime} --sm NN"
    )
    raise BuildError(message)


class EngineSession:
    """A loaded engine. Made by `open_engine`."""

    def __init__(
        self, library: Any, label: str, engine: Any, log: Any, *, name: str, device: int
    ) -> None:
        """Make an execution context on the GPU `device`."""
        self._cuda = _Cuda(device)
        self._library, self._engine, self._log, self._name = library, engine, log, name
        context = engine.create_execution_context()
        if context is None:
            raise BuildError(self._failed("make an execution context"))
        self._context = context
        self.providers = (f"{label} on {self._cuda.gpu}",)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = {each: engine.get_tensor_mode(each) == library.TensorIOMode.INPUT for each in names}
        self.input_names = tuple(each for each in names if given[each])
        self.output_names = tuple(each for each in names if not given[each])
        self._types = {
            each: np.dtype(library.nptype(engine.get_tensor_dtype(each))) for each in names
        }

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input; None where a size is dynamic."""
        shape = tuple(self._engine.get_tensor_shape(self.input_names[0]))
        return tuple(None if size < 0 else int(size) for size in shape)

    @property
    def largest_batch(self) -> int:
        """Clips that one run takes at most, by the engine's profile."""
        if self.input_shape[0] is not None:
            return self.input_shape[0]
        return int(self._engine.get_tensor_profile_shape(self.input_names[0], 0)[2][0])

    def run_named(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, for all inputs by name; large batches run in parts.

        Raises:
            InputError: an input of another name, type or size than the engine takes.
            BuildError: the run failed.
        """
        if set(inputs) != set(self.input_names):
            message = f"{self._name} takes {', '.join(self.input_names)}, got {', '.join(inputs)}"
            raise InputError(message)
        count, size = len(inputs[self.input_names[0]]), self.largest_batch
        parts = [
            self._run({name: array[at : at + size] for name, array in inputs.items()})
            for at in range(0, count, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, array in inputs.items():
            self._check(name, array)
            # TensorRT keeps the address until the run has ended.
            pointer = self._cuda.buffer(name, array.nbytes)
            self._cuda.upload(pointer, np.ascontiguousarray(array))
            self._context.set_tensor_address(name, pointer)
        outputs = {}
        for name in self.output_names:
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = np.empty(shape, self._types[name])
            pointer = self._cuda.buffer(name, outputs[name].nbytes)
            self._context.set_tensor_address(name, pointer)
        if not self._context.execute_async_v3(int(self._cuda.stream)):
            raise BuildError(self._failed("run"))
        for name, output in outputs.items():
            self._cuda.download(output, self._cuda.buffer(name, output.nbytes))
        self._cuda.wait()
        return outputs

    def kernels(self) -> dict[str, int]:
        """Layers of the engine by kind, as far as it was built to tell."""
        inspector = self._engine.create_engine_inspector()
        written = inspector.get_engine_information(self._library.LayerInformationFormat.JSON)
        layers = json.loads(written).get("Layers", [])
        kinds = (each.get("LayerType", "layer") if isinstance(each, dict) else "layer"
                 for each in layers)  # fmt: skip
        return dict(sorted(Counter(kinds).items()))

    def _check(self, name: str, array: Array) -> None:
        wanted = self._types[name]
        if array.dtype == wanted and self._context.set_input_shape(name, array.shape):
            return
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        message = (
            f"{self._name} takes {wanted} from {list(least)} to {list(most)} as input {name}, got "
            f"{array.dtype} {list(array.shape)}; prepare clips as the manifest says"
        )
        raise InputError(message)

    def _failed(self, what: str) -> str:
        reason = self._log.messages[-1] if self._log.messages else "TensorRT does not say why"
        return f"{self._name} failed to {what} ({reason}); build it again on this machine"


class _Cuda:
    """One GPU: its memory, by name, and one stream. What it took is given back with it."""

    def __init__(self, device: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            message = "memory of the GPU needs cuda-bindings: pip install cuda-bindings"
            raise MissingCapabilityError(message) from error
        self._runtime = runtime
        self._call("cudaSetDevice", device)
        facts = self._call("cudaGetDeviceProperties", device)
        self.gpu = f"{facts.name.decode()} (SM {facts.major}{facts.minor})"
        self.stream = self._call("cudaStreamCreate")
        self._buffers: dict[str, tuple[int, int]] = {}
        weakref.finalize(self, _free, runtime, self._buffers, self.stream)

    def buffer(self, name: str, num_bytes: int) -> int:
        """The address of at least `num_bytes` that are kept under `name`."""
        address, size = self._buffers.get(name, (0, 0))
        if size < num_bytes or not address:
            if address:
                self._call("cudaFree", address)
            # TensorRT wants an address for an empty tensor, too.
            address = int(self._call("cudaMalloc", max(1, num_bytes)))
            self._buffers[name] = (address, num_bytes)
        return address

    def upload(self, address: int, array: Array) -> None:
        """Copy `array`, which is contiguous, to the GPU, in the order of the stream."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)
        # The array may be gone before its copy has been made.
        self.wait()

    def download(self, array: Array, address: int) -> None:
        """Copy to `array`, which is there before `wait` returns."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def wait(self) -> None:
        """Until everything on the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, function)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            message = f"CUDA failed in {function}: {error.name}; see vcompress doctor"
            raise BuildError(message)
        return values[0] if values else None


def _free(runtime: Any, buffers: Mapping[str, tuple[int, int]], stream: Any) -> None:
    for address, _ in buffers.values():
        runtime.cudaFree(address)
    runtime.cudaStreamDestroy(stream)


def _log(library: Any) -> Any:
    """A TensorRT logger that keeps what went wrong, in `messages`."""

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.ERROR:
                self.messages.append(message)

    return Log()
