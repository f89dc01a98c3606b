"""Runs an ONNX model with ONNX Runtime, and says where and with which kernels it really runs.

ONNX Runtime falls back to the CPU without an error, and keeps a graph's Q/DQ pairs as plain float
arithmetic where no integer kernel takes them. Both are read back here: the providers of the
session, and the operators of the graph that it optimized for itself.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError
from vcompress.spec.strict_json import nearest

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CPU",
    "INTEGER_KERNELS",
    "Session",
    "available_providers",
    "in_float16",
    "open_session",
    "run_with_internal_values",
    "usable_threads",
]

Array = npt.NDArray[Any]
CPU = "CPUExecutionProvider"

# Kernels of ONNX Runtime that multiply integers. A layer that is quantized in the graph and shows
# up as none of these computes in float.
INTEGER_KERNELS = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention",
    "QGemm", "QLinearConv", "QLinearMatMul",
})  # fmt: skip

_DTYPES = {
    "tensor(bool)": np.bool_, "tensor(double)": np.float64, "tensor(float)": np.float32,
    "tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
    "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip
# ONNX Runtime prints warnings to standard error; what matters of them is read back instead.
_ERRORS_ONLY = 3


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        message = (
            f"ONNX Runtime is not installed ({error}): pip install 'vcompress-ai[cpu]', or "
            "'vcompress-ai[gpu]' on a machine with an NVIDIA GPU"
        )
        raise MissingCapabilityError(message) from error
    return onnxruntime


def available_providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime, which may still lack their libraries.

    Raises:
        MissingCapabilityError: ONNX Runtime is not installed.
    """
    return tuple(_library().get_available_providers())


def usable_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the number of cores that this process may use.

    ONNX Runtime itself takes every core of the machine. In a container, or beside other processes,
    its threads then wait for one another by spinning, and a run takes many times as long.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(
    onnx_path: Path, *, providers: tuple[str, ...] = (CPU,), threads: int | None = None
) -> Session:
    """Load a model for running.

    Args:
        onnx_path: the model; weights in files beside it are found.
        providers: execution providers in order of preference. All must really be used.
        threads: of one operator on the CPU; None for `usable_threads()`.

    Raises:
        InputError: no such file.
        MissingCapabilityError: ONNX Runtime or a provider is not installed.
        BuildError: ONNX Runtime does not take the model, or fell back to another provider.
    """
    library = _library()
    if not onnx_path.is_file():
        message = f"{onnx_path} is not a file; give an ONNX model"
        raise InputError(message)
    _require_providers(providers, available_providers())
    options = _options(library, threads)
    native = _create(library, onnx_path, options, providers)
    _confirm_providers(providers, native.get_providers())
    return Session(onnx_path, native, threads)


class Session:
    """A loaded model. Made by `open_session`."""

    def __init__(self, onnx_path: Path, native: Any, threads: int | None) -> None:
        self._path = onnx_path
        self._native = native
        self._threads = threads

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers that the session really has, in order."""
        return tuple(self._native.get_providers())

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the graph."""
        return tuple(value.name for value in self._native.get_inputs())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the graph."""
        return tuple(value.name for value in self._native.get_outputs())

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input; None where a size is dynamic."""
        return _shape(self._native.get_inputs()[0])

    @property
    def batch_is_dynamic(self) -> bool:
        """Whether the first axis of the first input may have any size."""
        return self.input_shape[:1] == (None,)

    def run(self, batch: Array) -> Array:
        """The first output for the only input.

        Args:
            batch: of `input_shape` and of the dtype of the graph.

        Raises:
            InputError: the model has several inputs, or shape or dtype differ from the graph's.
            BuildError: ONNX Runtime failed while running.
        """
        names = self.input_names
        if len(names) != 1:
            message = f"{self._path.name} has the inputs {', '.join(names)}; use run_named"
            raise InputError(message)
        return self.run_named({names[0]: batch})[self.output_names[0]]

    def run_named(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, for all inputs by name."""
        expected = {value.name: value for value in self._native.get_inputs()}
        if inputs.keys() != expected.keys():
            message = (
                f"{self._path.name} needs the inputs {', '.join(expected)}, got "
                f"{', '.join(inputs) or 'none'}"
            )
            raise InputError(message)
        for name, array in inputs.items():
            _check_array(self._path.name, expected[name], array)
        try:
            outputs = self._native.run(None, dict(inputs))
        except Exception as error:  # every failure of the native library is an exception of its own
            message = f"ONNX Runtime failed to run {self._path.name}: {_reason(error)}"
            raise BuildError(message) from error
        return dict(zip(self.output_names, outputs, strict=True))

    def profile(self, inputs: Mapping[str, Array], *, calls: int) -> list[dict[str, Any]]:
        """The events that ONNX Runtime's profiler records over `calls` calls, after one to warm up.

        A session of its own is opened for it; the times of the warm-up are among the events.
        """
        library = _library()
        with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
            options = _options(library, self._threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            native = _create(library, self._path, options, self.providers)
            for _ in range(1 + calls):
                native.run(None, dict(inputs))
            events = json.loads(Path(native.end_profiling()).read_text(encoding="utf-8"))
        return list(events)

    def kernels(self) -> dict[str, int]:
        """How often each operator stands in the graph that ONNX Runtime really executes.

        The optimized graph is written once more to a temporary folder and counted there, inside
        branches and loops, too. Compare with `INTEGER_KERNELS` to see whether layers that are
        quantized in the graph run as integers.
        """
        import onnx

        library = _library()
        with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            options = _options(library, self._threads)
            options.optimized_model_filepath = str(optimized)
            # Weights go to a file of their own: a model of more than 2 GiB cannot hold them.
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights.bin"
            )
            _create(library, self._path, options, self.providers)
            graph = onnx.load(optimized, load_external_data=False).graph
        return dict(sorted(Counter(_operators(graph)).items()))


def in_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` in float16 behind its inputs and before its outputs, by ONNX Runtime's own tool."""
    _library()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=True, disable_shape_infer=True, force_fp16_initializers=True
    )
    return converted


def run_with_internal_values(
    onnx_path: Path, inputs: Mapping[str, Array], names: Iterable[str]
) -> dict[str, Array]:
    """Run once on the CPU; the outputs and the internal values `names` of the graph, by name.

    An internal value that is asked for is kept by ONNX Runtime, so it is not fused away.

    Raises:
        InputError: no such file, or the graph computes no such value.
        MissingCapabilityError: ONNX Runtime is not installed.
        BuildError: ONNX Runtime does not take the model or failed while running.
    """
    import onnx

    library = _library()
    if not onnx_path.is_file():
        message = f"{onnx_path} is not a file; give an ONNX model"
        raise InputError(message)
    model = onnx.load(onnx_path, load_external_data=False)
    computed = {name for node in model.graph.node for name in node.output}
    already = {value.name for value in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in computed:
            message = f"{onnx_path.name} computes no value {name!r}{nearest(name, computed)}"
            raise InputError(message)
        if name not in already:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = _options(library, None)
    # The changed model is in memory; its weights may be in files beside the original.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(onnx_path.parent)
    )
    native = _create(library, onnx_path, options, (CPU,), content=model.SerializeToString())
    return Session(onnx_path, native, None).run_named(inputs)


def _options(library: Any, threads: int | None) -> Any:
    options = library.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = usable_threads() if threads is None else threads
    return options


def _create(
    library: Any,
    onnx_path: Path,
    options: Any,
    providers: tuple[str, ...],
    *,
    content: bytes | None = None,
) -> Any:
    """A session for the file, or for `content` in place of what the file holds."""
    try:
        return library.InferenceSession(
            content or os.fspath(onnx_path), sess_options=options, providers=list(providers)
        )
    except Exception as error:  # every failure of the native library is an exception of its own
        if "INVALID_PROTOBUF" in str(error):
            message = f"{onnx_path} is not an ONNX model, or is damaged; export it again"
            raise InputError(message) from error
        message = (
            f"ONNX Runtime {library.__version__} cannot load {onnx_path.name}: "
            f"{_reason(error)}; export with the dialect that is made for this runtime"
        )
        raise BuildError(message) from error


def _require_providers(wanted: tuple[str, ...], available: Iterable[str]) -> None:
    """Raise unless the installed package has the providers at all."""
    available = tuple(available)
    missing = [provider for provider in wanted if provider not in available]
    if missing:
        message = (
            f"this ONNX Runtime has no {', '.join(missing)}, it has {', '.join(available)}; "
            "pip uninstall onnxruntime, then pip install 'vcompress-ai[gpu]' on a machine with an "
            "NVIDIA GPU"
        )
        raise MissingCapabilityError(message)


def _confirm_providers(wanted: tuple[str, ...], actual: Iterable[str]) -> None:
    """Raise if a session does not use the providers that it was asked to use."""
    actual = tuple(actual)
    if actual[: len(wanted)] != wanted:
        message = (
            f"ONNX Runtime was asked for {', '.join(wanted)} and fell back to "
            f"{', '.join(actual)}: a library or the GPU is missing; see vcompress doctor, or run "
            f"with {CPU}"
        )
        raise BuildError(message)


def _shape(value: Any) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _check_array(model: str, value: Any, array: Array) -> None:
    shape = _shape(value)
    fits = len(shape) == array.ndim and all(
        wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
    )
    dtype = _DTYPES.get(value.type)
    if not fits or (dtype is not None and array.dtype != dtype):
        readable = ", ".join("?" if size is None else str(size) for size in shape)
        message = (
            f"{model} takes {value.type} [{readable}] as input {value.name}, got {array.dtype} "
            f"{list(array.shape)}; prepare clips as the manifest says"
        )
        raise InputError(message)


def _operators(graph: onnx.GraphProto) -> Iterable[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _operators(attribute.g)


def _reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its own name and numbers."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip()).split("\n")[0]
