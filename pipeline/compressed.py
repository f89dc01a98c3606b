"""A compressed denoiser as a module, for a pipeline of diffusers that goes on as before.

    pipe.transformer = vcompress.compressed("out/")

The module is of the class that the pipeline knows, built from the configuration in the artifact,
with layers that hold packed weights. Its formats are simulated, which saves memory, not time; with
`execute=True` they run on the kernels of `compress.kernels`, with `runtime="onnxruntime"` the
exported graph runs on those of ONNX Runtime. A cache of the plan is in place and saves time;
`pipe.transformer.vcompress_cache.report()` tells what it did, and that of `vcompress_dynamic` which
inputs had four bits, where the plan decides so from step to step. Two transformers of one run may
each have one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vcompress.compress.cache import apply_cache
from vcompress.compress.cache.catalog import POLICIES
from vcompress.compress.dynamic import apply_dynamic
from vcompress.compress.kernels import execute as kernels
from vcompress.compress.passes import PASSES, QuantizePass
from vcompress.compress.restore import restore_module
from vcompress.compress.tensors import ModelTensors
from vcompress.export.sessions import open_graph
from vcompress.models.empty import empty_module
from vcompress.models.structure import find_blocks, find_layers
from vcompress.models.video import VideoModel
from vcompress.pipeline.graph_module import graph_module
from vcompress.pipeline.planning import read_plan
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact, sha256_of
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.call import CallSpec
from vcompress.spec.errors import InputError
from vcompress.spec.plan import CompressionPlan, LayerFacts

__all__ = ["compressed", "one_precision", "without_cache"]


def compressed(
    path: Path | str, *, dtype: torch.dtype | None = None, execute: bool = False,
    device: torch.device | str = "cpu", runtime: str | None = None, threads: int | None = None,
) -> nn.Module:  # fmt: skip
    """The planned module of the artifact at `path`, in evaluation mode.

    Args:
        dtype: what is computed in; by default that of the original weights.
        execute: run packed weights on real kernels instead of simulating them, see
            `compress.kernels.execute`, which says for every layer what runs.
        device: where the module goes.
        runtime: "onnxruntime" or "openvino", to let the exported graph compute, on the CPU and in
            float32. Calls must be of the size that was compressed, and a cache must be one that
            leaves out the whole model: schedule (forecast) or easycache.
        threads: of `runtime`; None for as many as the process may use.

    Raises:
        InputError: no artifact, one of another kind of model, or files that were changed.
        MissingCapabilityError: diffusers is not installed, or `device` cannot execute.
    """
    artifact, plan, tensors = _opened(Path(path))
    if runtime is not None:
        if execute or dtype is not None or str(device) != "cpu":
            message = (
                f"runtime={runtime!r} computes in float32 on the CPU by itself; leave out dtype, "
                "execute and device"
            )
            raise InputError(message)
        if plan.dynamic_precision is not None:
            raise InputError(one_precision(f"runtime={runtime!r}"))
        return _with_cache(_in_runtime(artifact, plan.cache, runtime, threads), plan.cache)
    if plan.dynamic_precision is not None and execute:
        raise InputError(one_precision("execute=True"))
    module, stored = _restored(artifact, plan, tensors)
    if dtype is not None and dtype != stored:
        _cast(module, dtype)
    if execute:
        kernels.execute(module, device=device)
    else:
        module.to(device)
    if plan.dynamic_precision is not None:
        # Neither it nor a cache is a submodule: what they keep is no weight.
        module.__dict__["vcompress_dynamic"] = apply_dynamic(module, plan.dynamic_precision)
    return _with_cache(module, plan.cache)


def without_cache(path: Path) -> tuple[nn.Module, CompressionPlan]:
    """The module of the artifact at `path` without what its plan does from step to step.

    Raises:
        InputError: as of `compressed`.
    """
    artifact, plan, tensors = _opened(path)
    return _restored(artifact, plan, tensors)[0], plan


def one_precision(asked: str) -> str:
    """Why `asked` does not go with a plan that changes precision from step to step."""
    return (
        f"the plan's dynamic_precision is simulated in torch only, {asked} has one precision for "
        "every step; load without it, or make the artifact without --dynamic-precision"
    )


def _opened(path: Path) -> tuple[Artifact, CompressionPlan, ModelTensors]:
    """An artifact of a model of diffusers, with its plan."""
    artifact = Artifact.open(path)
    if _verified(artifact, "config") is None or artifact.manifest.get("call") is None:
        message = (
            f"{path} is an artifact of {artifact.manifest['name']}, which is no model of "
            "diffusers; run its model.onnx instead"
        )
        raise InputError(message)
    return artifact, *read_plan(_required(artifact, "plan", "plan"))


def _restored(
    artifact: Artifact, plan: CompressionPlan, tensors: ModelTensors
) -> tuple[nn.Module, torch.dtype]:
    """The planned module with packed weights, and the type that its other weights are stored in."""
    configuration = strict_json.read(_required(artifact, "config", "configuration"))
    weights = _required(artifact, "weights", "weights for torch")
    module = empty_module(configuration)
    facts = {name: _facts(module, name) for name in plan.quantize}
    model = VideoModel(
        name=str(artifact.manifest["name"]), module=module, task="denoise",
        family=str(configuration["_class_name"]),
        inputs=CallSpec.from_dict(artifact.manifest["call"]), layers=facts,
        blocks=find_blocks(module, facts), config=configuration, source=str(artifact.path),
    )  # fmt: skip
    stored = torch.float32
    for step in PASSES:
        if isinstance(step, QuantizePass):
            # Its weights are stored as they came out.
            stored = restore_module(module, plan.quantize, weights)
        else:
            step.apply(model, plan, tensors)
    return module.eval().requires_grad_(False), stored


def _in_runtime(
    artifact: Artifact, section: CacheSection | None, runtime: str, threads: int | None
) -> nn.Module:
    """A module whose calls run the artifact's graph."""
    if section is not None and POLICIES[section.policy].level != "model":
        message = (
            f"the cache {section.policy} decides about blocks, which the exported graph hides; "
            "load without runtime=, or export the cache in the graph with export_cached"
        )
        raise InputError(message)
    for role in ("onnx", "openvino-onnx"):
        _verified(artifact, role)
    configuration = strict_json.read(_required(artifact, "config", "configuration"))
    return graph_module(configuration, open_graph(artifact, runtime, threads=threads))


def _with_cache(module: nn.Module, section: CacheSection | None) -> nn.Module:
    if section is not None:
        module.__dict__["vcompress_cache"] = apply_cache(module, section)
    return module


def _facts(module: nn.Module, name: str) -> LayerFacts:
    found = find_layers(module, {name})
    if name not in found:
        message = f"the plan's layer {name} is no part of {type(module).__name__}"
        raise InputError(message)
    return found[name]


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is not frozen to `dtype`, but what the class wants in float32."""
    keep = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not keep & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _verified(artifact: Artifact, role: str) -> Path | None:
    """The file with this role, its sha256 compared; None if there is none."""
    for entry in artifact.manifest["files"]:
        if entry["role"] == role:
            path = artifact.path / str(entry["path"])
            if sha256_of(path) != entry["sha256"]:
                message = f"{path} was changed since the artifact was made; make it again"
                raise InputError(message)
            return path
    return None


def _required(artifact: Artifact, role: str, what: str) -> Path:
    path = _verified(artifact, role)
    if path is None:
        message = f"{artifact.path} has no {what}; make the artifact again"
        raise InputError(message)
    return path
