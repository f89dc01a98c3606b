"""More from an artifact that is there: files for other runtimes.

Nothing is decided anew and no model is needed: all is made from the artifact's own graphs, read
back, and run on the golden clips where this machine can run it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from vcompress.export import engine as engines
from vcompress.export.artifact_files import copy_files, graph_file
from vcompress.export.deployed import open_deployed
from vcompress.export.dialects.onnxruntime_cuda import for_onnxruntime_cuda
from vcompress.export.dialects.openvino import for_openvino
from vcompress.export.manifest import INPUT_NAME
from vcompress.export.publish import staged_directory, write_manifest
from vcompress.export.readback import read_precision
from vcompress.export.runtime import CPU, in_float16
from vcompress.export.shape_profiles import ShapeProfile, profiles_around
from vcompress.spec.artifact import Artifact
from vcompress.spec.clip import ClipSpec
from vcompress.spec.errors import BuildError, InputError, MissingCapabilityError

__all__ = ["RUNTIMES", "Extension", "export_runtime", "require_formats"]

RUNTIMES = ("onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx", "tensorrt")
OPENVINO_FILE = "model.openvino.onnx"
CUDA_FILE = "model.cuda.onnx"
_LARGEST_CUDA_BYTES = 1_800_000_000
# The first GPUs with tensor cores for a format: Ada, and Blackwell.
_LEAST_SM = {
    "fp8": 89, "fp8_channel": 89, "nvfp4": 100, "mxfp8": 100, "mxfp4": 100,
}  # fmt: skip
_NAMES = {"nvfp4": "FP4", "mxfp4": "FP4", "mxfp8": "MXFP8", "fp8": "FP8", "fp8_channel": "FP8"}


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What was made, and what is known of it.

    Attributes:
        path: the artifact.
        file: name of the file for the runtime.
        written: whether it is new.
        runtime: as it was asked for.
        kernels: operators that the runtime really executes, where it runs here.
        golden_relative_l2: of the golden clips, where it runs here.
        formats: number of layers by format, read back from the file.
        facts: what the builder of an engine says.
    """

    path: Path
    file: str
    written: bool
    runtime: str
    kernels: Mapping[str, int]
    golden_relative_l2: float | None
    formats: Mapping[str, int]
    facts: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "artifact": str(self.path), "file": self.file, "written": self.written,
            "runtime": self.runtime, "kernels": dict(self.kernels),
            "golden_relative_l2": self.golden_relative_l2, "formats": dict(self.formats),
            "facts": dict(self.facts),
        }  # fmt: skip


def export_runtime(path: Path, runtime: str, *, sm: str = "120") -> Extension:
    """Add to an artifact what `runtime` takes, unless it is there, and prove it.

    Args:
        path: the artifact; replaced as a whole by one with one file more.
        runtime: one of `RUNTIMES`.
        sm: compute capability of the GPU that an engine is for.

    Raises:
        InputError: no artifact, or an unknown runtime.
        MissingCapabilityError: a package is missing, or the GPU has no units for a format.
        BuildError: the runtime does not take the graph, or computes something else.
    """
    if runtime not in RUNTIMES:
        message = f"unknown runtime {runtime!r}; choose one of: {', '.join(RUNTIMES)}"
        raise InputError(message)
    artifact = Artifact.open(path, verify_hashes=True)
    if runtime in ("tensorrt-rtx", "tensorrt"):
        return _engine(artifact, runtime, sm)
    written = False
    if runtime == "openvino" and artifact.file("openvino-onnx") is None:
        artifact, written = _with_openvino(artifact), True
    if runtime == "onnxruntime-cuda":
        return _cuda(artifact)
    role = "onnx" if runtime == "onnxruntime" else "openvino-onnx"
    file = graph_file(artifact, role)
    deployed = open_deployed(path, runtime=runtime)
    return Extension(
        path=path, file=file.name, written=written, runtime=runtime,
        kernels=deployed.session.kernels(), golden_relative_l2=deployed.check(),
        formats=Counter(read_precision(file).formats.values()), facts={},
    )  # fmt: skip


def require_formats(graph: Path, sm: str) -> None:
    """Raise unless GPUs of compute capability `sm` have units for the formats of the file.

    Raises:
        MissingCapabilityError: they have not; the message offers formats that they have.
    """
    counts = Counter(read_precision(graph).formats.values())
    missing = [name for name in counts if int(sm) < _LEAST_SM.get(name, 0)]
    if not missing:
        return
    needs = max(_LEAST_SM[name] for name in missing)
    what = " and ".join(dict.fromkeys(_NAMES[name] for name in missing))
    layers = ", ".join(f"{counts[name]} {name}" for name in missing)
    eight = "--target fp8, --target int8" if int(sm) >= _LEAST_SM["fp8"] else "--target int8"
    message = (
        f"SM {sm} has no {what} units, which came with SM {needs}, and this artifact has layers in "
        f"{layers}; make it again with {eight}, or with --target int4 (W4A16: four-bit weights, "
        "inputs stay float)"
    )
    raise MissingCapabilityError(message)


def _profiles(artifact: Artifact, source: Path) -> dict[str, ShapeProfile]:
    """Sizes for axes that are free beyond the batch: from those of the manifest on."""
    clip = artifact.manifest["clip"]
    if clip is None:
        return {}
    return profiles_around(source, {INPUT_NAME: (1, *ClipSpec.from_dict(clip).input_shape)})


def _engine(artifact: Artifact, runtime: str, sm: str) -> Extension:
    source = graph_file(artifact, "tensorrt-onnx")
    require_formats(source, sm)
    name = f"model.sm{sm}.engine" if runtime == "tensorrt-rtx" else f"model.trt.sm{sm}.engine"
    with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
        made = Path(folder) / name
        facts = engines.build_engine(
            source, made, runtime=runtime, sm=sm, shape_profiles=_profiles(artifact, source)
        )
        library = "TensorRT-RTX" if runtime == "tensorrt-rtx" else "TensorRT"
        about = {"runtime": library, "version": facts.version, "sm": sm}
        _add(artifact, made, "engine", about)
    # An engine for the GPU of this machine is run; for others nothing here can.
    deployed = (
        open_deployed(artifact.path, runtime=runtime)
        if sm in engines.own_sm() and artifact.manifest["clip"] is not None
        else None
    )
    return Extension(
        path=artifact.path, file=name, written=True, runtime=runtime,
        kernels={} if deployed is None else deployed.session.kernels(),
        golden_relative_l2=None if deployed is None else deployed.check(),
        formats=Counter(read_precision(source).formats.values()),
        facts=facts.as_dict(),
    )  # fmt: skip


def _cuda(artifact: Artifact) -> Extension:
    """Four-bit weights in float16 for ONNX Runtime on CUDA; the golden clips run on the CPU."""
    source = graph_file(artifact, "tensorrt-onnx")
    counts = Counter(read_precision(source).formats.values())
    four_bits = {name: count for name, count in counts.items() if name.startswith("int4")}
    others = ", ".join(
        f"{count} {name}" for name, count in counts.items() if name not in (*four_bits, "float")
    )
    if others or not four_bits:
        message = (
            "ONNX Runtime on CUDA has no products of integers or of FP8 and FP4 inputs, and this "
            f"artifact has layers in {others or 'float alone'}; make it again with --target int4 "
            "(W4A16), or build an engine: --runtime tensorrt-rtx or tensorrt"
        )
        raise MissingCapabilityError(message)
    with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
        made = Path(folder) / CUDA_FILE
        model = in_float16(for_onnxruntime_cuda(onnx.load(source)))
        if model.ByteSize() > _LARGEST_CUDA_BYTES:
            message = (
                f"{CUDA_FILE} would have {model.ByteSize() / 1e9:.1f} GB, and such a graph can "
                "have 1.8; build an engine: --runtime tensorrt"
            )
            raise BuildError(message)
        onnx.save(model, made)
        (opset,) = (each.version for each in model.opset_import if each.domain == "")
        _add(artifact, made, "cuda-onnx", {"opset": opset, "dialect": "onnxruntime-cuda"})
    deployed = open_deployed(artifact.path, runtime="onnxruntime-cuda", provider=CPU)
    return Extension(
        path=artifact.path, file=CUDA_FILE, written=True, runtime="onnxruntime-cuda",
        kernels=deployed.session.kernels(), golden_relative_l2=deployed.check(), formats=counts,
        facts={},
    )  # fmt: skip


def _with_openvino(artifact: Artifact) -> Artifact:
    source = graph_file(artifact, "tensorrt-onnx")
    with tempfile.TemporaryDirectory(prefix="vcompress-") as folder:
        made = Path(folder) / OPENVINO_FILE
        # Large weights stay where they are: the new file names the same one.
        model = for_openvino(onnx.load(source, load_external_data=False))
        onnx.save(model, made)
        planned, found = (read_precision(each).formats for each in (source, made))
        if planned != found:
            wrong = [name for name in planned if found.get(name) != planned[name]]
            message = f"{made.name} does not hold what {source.name} holds: {', '.join(wrong[:5])}"
            raise BuildError(message)
        (opset,) = (each.version for each in model.opset_import if each.domain == "")
        _add(artifact, made, "openvino-onnx", {"opset": opset, "dialect": "openvino"})
    return Artifact.open(artifact.path)


def _add(artifact: Artifact, file: Path, role: str, about: Mapping[str, Any]) -> None:
    """Publish the artifact anew, with one file more or replaced."""
    with staged_directory(artifact.path, force=True) as staging:
        roles, abouts = copy_files(artifact, staging, without=(file.name,))
        shutil.copyfile(file, staging / file.name)
        manifest = {key: value for key, value in artifact.manifest.items() if key != "files"}
        write_manifest(
            staging, manifest, roles={**roles, file.name: role}, about={**abouts, file.name: about}
        )
