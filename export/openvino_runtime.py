"""Runs an ONNX model with OpenVINO, and says on which device and with which kernels it runs.

OpenVINO may compute in bfloat16 or float16 where the processor is faster with them: then the
numbers are not those that were proven. Here it is told to stay with float32, and kernels are read
back from the compiled graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.export.runtime import usable_threads
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

__all__ = ["OpenvinoSession", "open_openvino"]

Array = npt.NDArray[Any]
_PRODUCTS = ("FullyConnected", "Convolution", "MatMul")


def open_openvino(
    onnx_path: Path, *, device: str = "CPU", threads: int | None = None
) -> OpenvinoSession:
    """Load a model for running.

    Args:
        onnx_path: the model; weights in files beside it are found.
        device: in OpenVINO's words; it must really be used.
        threads: on the CPU; None for `usable_threads()`.

    Raises:
        InputError: no such file.
        MissingCapabilityError: OpenVINO or the device is missing.
        BuildError: OpenVINO does not take the model, or uses another device.
    """
    try:
        import openvino
    except ImportError as error:
        message = f"OpenVINO is not installed ({error}): pip install 'vcompress-ai[openvino]'"
        raise MissingCapabilityError(message) from error
    if not onnx_path.is_file():
        message = f"{onnx_path} is not a file; give an ONNX model"
        raise InputError(message)
    core = openvino.Core()
    if device not in core.available_devices:
        message = (
            f"OpenVINO has no device {device}, it has {', '.join(core.available_devices)}; "
            "install its driver, or take another device"
        )
        raise MissingCapabilityError(message)
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if device == "CPU":
        options["INFERENCE_NUM_THREADS"] = usable_threads() if threads is None else threads
    try:
        model = core.read_model(onnx_path)
        # A compiled input also goes by the names of operators that were found to do nothing to it.
        names = [
            tuple(value.any_name for value in values) for values in (model.inputs, model.outputs)
        ]
        compiled = core.compile_model(model, device, options)
    except Exception as error:  # the native library raises RuntimeError for everything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "Check '" in line or "message" in line), lines[-1])
        message = f"OpenVINO {openvino.__version__} cannot load {onnx_path.name}: {reason}"
        raise BuildError(message) from error
    actual = tuple(compiled.get_property("EXECUTION_DEVICES"))
    if actual != (device,):
        message = f"OpenVINO was asked for {device} and runs on {', '.join(actual)}"
        raise BuildError(message)
    return OpenvinoSession(onnx_path, compiled, *names)


class OpenvinoSession:
    """A loaded model. Made by `open_openvino`."""

    def __init__(
        self, onnx_path: Path, compiled: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        self._path, self._compiled = onnx_path, compiled
        self._input_names, self._output_names = inputs, outputs

    @property
    def providers(self) -> tuple[str, ...]:
        """Devices that the model really runs on."""
        return tuple(self._compiled.get_property("EXECUTION_DEVICES"))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the graph."""
        return self._input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the graph."""
        return self._output_names

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input; None where a size is dynamic."""
        shape = self._compiled.inputs[0].partial_shape
        return tuple(None if size.is_dynamic else size.get_length() for size in shape)

    def run_named(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, for all inputs by name.

        Raises:
            InputError: the inputs are not those of the model.
            BuildError: OpenVINO failed, or returned another number of clips than it was given.
        """
        if set(inputs) != set(self.input_names):
            message = (
                f"{self._path.name} needs the inputs {', '.join(self.input_names)}, got "
                f"{', '.join(inputs) or 'none'}"
            )
            raise InputError(message)
        for name, value in zip(self.input_names, self._compiled.inputs, strict=True):
            wanted, got = np.dtype(value.element_type.to_dtype()), inputs[name].dtype
            if wanted != got:
                # OpenVINO would convert it without a word.
                message = f"{self._path.name} takes {wanted} as input {name}, got {got}"
                raise InputError(message)
        try:
            results = self._compiled(dict(inputs))
        except Exception as error:  # the native library raises RuntimeError for everything
            lines = str(error).strip().splitlines()
            message = f"OpenVINO failed to run {self._path.name}: {lines[-1]}"
            raise BuildError(message) from error
        outputs = {
            name: np.array(results[value])
            for name, value in zip(self.output_names, self._compiled.outputs, strict=True)
        }
        for name, output in outputs.items():
            if output.size == 0:
                message = (
                    f"OpenVINO gave an empty {name} for {self._path.name}; export the artifact "
                    "for it: vcompress export ARTIFACT --runtime openvino"
                )
                raise BuildError(message)
        return outputs

    def kernels(self) -> dict[str, int]:
        """How often each kind of product stands in the compiled graph, by the type it computes in.

        "FullyConnected u8" and "FullyConnected i8" multiply integers, "FullyConnected f32" floats.
        """
        counts: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            kind = facts["layerType"].astype(str)
            if kind in _PRODUCTS:
                counts[f"{kind} {facts['runtimePrecision'].astype(str)}"] += 1
        return dict(sorted(counts.items()))
