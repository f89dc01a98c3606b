"""The translated module against what the file itself computes.

An ONNX file is run by ONNX Runtime, a program by torch. Where they differ, the first value of the
graph that departs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from vcompress.models.graphs.onnx_file import OnnxFile
from vcompress.models.graphs.onnx_module import VALUE
from vcompress.spec.errors import InputError, MissingCapabilityError

__all__ = [
    "check_parity", "departs_at", "onnx_runner", "random_clips", "relative_error",
    "takes_any_batch",
]  # fmt: skip

# Relative L2 of the output. Files with 16-bit weights are computed in float32 here.
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2
_NUM_INPUTS = 2

Array = npt.NDArray[Any]


def random_clips(shape: Sequence[int], dtype: str, seed: int) -> torch.Tensor:
    """Clips of `shape`, as loaded models see them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "uint8":
        return torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=generator)
    return torch.randn(tuple(shape), generator=generator)


def check_parity(
    module: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor], shape: Sequence[int],
    dtype: str, *, half: bool, path: Path, locate: Callable[[torch.Tensor], str] | None = None,
) -> float:  # fmt: skip
    """The largest relative L2 between `module` and `run` on two inputs of `shape`.

    Raises:
        InputError: it is more than 1e-5 (2e-2 for weights of 16 bits).
    """
    allowed, worst = (HALF_TOLERANCE if half else TOLERANCE), 0.0
    for seed in range(_NUM_INPUTS):
        clips = random_clips(shape, dtype, seed)
        with torch.inference_mode():
            error = relative_error(module(clips), run(clips))
        if not error <= allowed:
            where = locate(clips) if locate is not None else ""
            message = (
                f"{path}: the module that was made of it departs from the file by {error:.1e} "
                f"(allowed {allowed:.0e}){where}; give the model's module instead"
            )
            raise InputError(message)
        worst = max(worst, error)
    return worst


def takes_any_batch(module: torch.nn.Module, clips: torch.Tensor) -> bool:
    """Whether two batches like `clips` at once give what each gives alone."""
    first, second = clips, random_clips(clips.shape, str(clips.dtype).removeprefix("torch."), 1)
    with torch.inference_mode():
        apart = torch.cat([module(first), module(second)])
        try:
            together = module(torch.cat([first, second]))
        except Exception:
            # Whatever an operator says of sizes that do not fit.
            return False
    return relative_error(together, apart) <= TOLERANCE


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    size = torch.linalg.vector_norm(theirs.float())
    error = torch.linalg.vector_norm(ours.float() - theirs.float())
    return float(error / size) if size > 0 else float(error)


def onnx_runner(file: OnnxFile) -> Callable[[torch.Tensor], torch.Tensor]:
    """ONNX Runtime on the file itself, from clips to the first output.

    Raises:
        MissingCapabilityError: it is not installed.
        InputError: it does not take the file.
    """
    session = _session(str(file.path))
    name = session.get_outputs()[0].name

    def run(clips: torch.Tensor) -> torch.Tensor:
        try:
            (result,) = session.run([name], {file.input_name: _fed(clips, file)})
        except Exception as error:
            message = (
                f"ONNX Runtime cannot run {file.path} on {tuple(clips.shape)}: "
                f"{str(error).splitlines()[0][:300]}"
            )
            raise InputError(message) from error
        return torch.from_numpy(np.asarray(result))

    return run


def _fed(clips: torch.Tensor, file: OnnxFile) -> Array:
    array: Array = clips.numpy()
    return array if file.dtype == "uint8" else array.astype(file.dtype)


def _session(model: str | bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        message = (
            "a model from an ONNX file is checked against ONNX Runtime, which is not installed: "
            "pip install 'vcompress-ai[cpu]'"
        )
        raise MissingCapabilityError(message) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = model if isinstance(model, str) else "the graph"
        message = f"ONNX Runtime does not take {what}: {str(error).splitlines()[0][:300]}"
        raise InputError(message) from error


def departs_at(file: OnnxFile, flat: fx.GraphModule, clips: torch.Tensor, half: bool) -> str:
    """A phrase that names the first value of the graph where `flat` departs from the file."""
    import onnx

    proto = onnx.load(str(file.path))
    known = {name for node in proto.graph.node for name in node.output}
    ours: dict[str, torch.Tensor] = {}

    class Keeper(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            name = n.meta.get(VALUE)
            if isinstance(value, torch.Tensor) and name is not None and name in known:
                ours[name] = value
            return value

    with torch.inference_mode():
        Keeper(flat).run(clips)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in ours)
    results = _session(proto.SerializeToString()).run(
        list(ours), {file.input_name: _fed(clips, file)}
    )
    makers = {name: node for node in proto.graph.node for name in node.output}
    for name, theirs in zip(ours, results, strict=True):
        found = torch.from_numpy(np.asarray(theirs))
        if relative_error(ours[name], found) > (HALF_TOLERANCE if half else TOLERANCE):
            maker = makers[name]
            return f", first at {name} ({maker.op_type} {maker.name})"
    return ""
