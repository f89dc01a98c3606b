"""What this machine can build, run, and only simulate: the facts behind `vcompress doctor`.

Versions come from package metadata; a library is imported only where it alone knows the answer and
its import is quick. A target "works" where its first format runs in real kernels here, and is
"simulated" where only its numbers can be checked.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from vcompress.export import engine, runtime
from vcompress.spec.errors import MissingCapabilityError
from vcompress.spec.target import TARGETS, Target

__all__ = ["Capability", "Gpu", "capabilities"]

Status = Literal["works", "simulated", "missing"]

# From here on GPUs have tensor cores for the format: Turing, Ada, Blackwell.
_LEAST_SM = {"int8": 75, "fp8": 89, "nvfp4": 100}
# Instructions that multiply and add 8-bit integers in one step: x86, then Arm.
_INT8_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
_CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg")


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One line of `vcompress doctor`.

    Attributes:
        name: package, device or "target <name>".
        status: "works", "simulated" or "missing".
        detail: version and what can be done with it.
        remedy: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU: its name, its compute capability ("120") and its memory."""

    name: str
    sm: str
    memory_gib: float


def capabilities() -> list[Capability]:
    """Everything that `vcompress doctor` prints, in its order."""
    gpus = _gpus()
    return [
        _processor(),
        _gpu(gpus),
        _torch(),
        _onnxruntime(gpus),
        _tensorrt_rtx(gpus),
        _tensorrt(gpus),
        _package("openvino", "openvino", "pip install 'vcompress-ai[openvino]'"),
        _package("modelopt", "nvidia-modelopt", "pip install nvidia-modelopt"),
        _package("transformers", "transformers", "pip install 'vcompress-ai[hf]'"),
        _package("diffusers", "diffusers", "pip install 'vcompress-ai[hf]'"),
        _av(),
        *(_target(target, gpus) for target in TARGETS.values()),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(module: str, distribution: str, remedy: str) -> Capability:
    version = _version(distribution)
    if version is None or util.find_spec(module) is None:
        return Capability(name=module, status="missing", detail="not installed", remedy=remedy)
    return Capability(name=module, status="works", detail=version)


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        sm = f"{facts.major}{facts.minor}"
        found.append(Gpu(name=facts.name, sm=sm, memory_gib=facts.total_memory / 2**30))
    return tuple(found)


def _processor() -> Capability:
    name, flags = platform.machine(), set[str]()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        text = information.read_text(errors="replace")
        if match := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
            name = f"{match[1].strip()} ({name})"
        if match := re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE):
            flags = set(match[1].split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    integer = [feature for feature in _INT8_FEATURES if feature in flags]
    speed = f"INT8 in hardware: {', '.join(integer)}" if integer else "INT8 in hardware: none found"
    remedy = "" if integer else "INT8 may be slower than float here: measure before you deploy"
    detail = f"{name}, {cores} cores, {speed}"
    return Capability(name="processor", status="works", detail=detail, remedy=remedy)


def _gpu(gpus: tuple[Gpu, ...]) -> Capability:
    if not gpus:
        return Capability(
            name="gpu",
            status="missing",
            detail="torch sees no NVIDIA GPU; engines for other GPUs can still be built",
            remedy="to run or time an engine, take it to a machine with its GPU",
        )
    detail = ", ".join(f"{gpu.name} (SM {gpu.sm}, {gpu.memory_gib:.0f} GiB)" for gpu in gpus)
    return Capability(name="gpu", status="works", detail=detail)


def _torch() -> Capability:
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    return Capability(name="torch", status="works", detail=f"{torch.__version__}, built {build}")


def _onnxruntime(gpus: tuple[Gpu, ...]) -> Capability:
    name = "onnxruntime"
    try:
        providers = runtime.available_providers()
    except MissingCapabilityError as error:
        return Capability(
            name=name,
            status="missing",
            detail=str(error).split(":")[0],
            remedy="pip install 'vcompress-ai[cpu]', or 'vcompress-ai[gpu]' with an NVIDIA GPU",
        )
    versions = {each: _version(each) for each in ("onnxruntime", "onnxruntime-gpu")}
    present = [f"{each} {version}" for each, version in versions.items() if version]
    detail = f"{' and '.join(present)}: {', '.join(providers)}"
    remedy = ""
    if len(present) > 1:
        remedy = "two packages own one folder: uninstall both, then install one of them"
    elif "CUDAExecutionProvider" in providers and not gpus:
        remedy = "CUDAExecutionProvider is listed but there is no GPU: use CPUExecutionProvider"
    return Capability(name=name, status="works", detail=detail, remedy=remedy)


def _tensorrt_rtx(gpus: tuple[Gpu, ...]) -> Capability:
    version, sms = engine.library_version("tensorrt-rtx"), engine.supported_sms("tensorrt-rtx")
    if version is None:
        return Capability(
            name="tensorrt-rtx",
            status="missing",
            detail="not installed",
            remedy="pip install tensorrt-rtx-cu13 (Linux and Windows)",
        )
    runs = [gpu.name for gpu in gpus if gpu.sm in sms]
    detail = f"{version}, builds for SM {', '.join(sms)}, runs on {_listed(runs)}"
    return Capability(name="tensorrt-rtx", status="works", detail=detail)


def _tensorrt(gpus: tuple[Gpu, ...]) -> Capability:
    version = engine.library_version("tensorrt")
    if version is None:
        return Capability(
            name="tensorrt",
            status="missing",
            detail="not installed; it is needed for SM 87, 90, 100, 103 and 110 alone",
            remedy="pip install 'vcompress-ai[tensorrt]' on a machine with such a GPU",
        )
    here = _listed(gpu.name for gpu in gpus)
    return Capability(
        name="tensorrt", status="works", detail=f"{version}, builds for and runs on {here}"
    )


def _av() -> Capability:
    name = "av"
    try:
        import av
    except ImportError as error:
        return Capability(name=name, status="missing", detail=str(error), remedy="pip install av")
    known = [codec for codec in _CODECS if codec in av.codecs_available]
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    detail = f"{av.__version__} with libavcodec {ffmpeg}: {', '.join(known)}"
    return Capability(name=name, status="works", detail=detail)


def _target(target: Target, gpus: tuple[Gpu, ...]) -> Capability:
    """Whether the first format of a target is built, run or only simulated here."""
    first = target.formats[0]
    buildable = engine.supported_sms("tensorrt-rtx")
    built = [sm for sm in target.engine_sm if sm in buildable]
    builds = f"ONNX, engine for SM {', '.join(built)}" if built else "ONNX, no engine"
    runs = [gpu.name for gpu in gpus if _runs_engine(gpu, first, buildable)]
    if first == "int8" and util.find_spec("onnxruntime") is not None:
        runs.append("this processor with ONNX Runtime")
    # ONNX Runtime multiplies these in float: the scales stand between the codes and the product.
    if first == "int8_token" and util.find_spec("openvino") is not None:
        runs.append("this processor with OpenVINO")
    name, detail = f"target {target.name}", f"builds: {builds}; runs on: {_listed(runs)}"
    if runs:
        return Capability(name=name, status="works", detail=detail)
    return Capability(
        name=name,
        status="simulated",
        detail=f"{detail}; its numbers are checked, its speed cannot be measured",
        remedy=f"hardware for it: {target.hardware}",
    )


def _runs_engine(gpu: Gpu, first_format: str, rtx_sms: tuple[str, ...]) -> bool:
    """Whether an installed TensorRT executes the format on this GPU's tensor cores."""
    installed = gpu.sm in rtx_sms or engine.library_version("tensorrt") is not None
    least = _LEAST_SM.get(first_format)
    return installed and least is not None and int(gpu.sm) >= least


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing here"
