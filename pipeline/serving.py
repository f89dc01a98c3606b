"""An artifact for a server, with the cache of its plan in the graph.

Triton keeps a state between the requests of a sequence. A denoiser whose plan has a cache goes
there as a graph of one step with the cache inside, traced from the packed weights of the artifact
and compared with them, step by step, before anything is written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vcompress.export.serving import export_for_server as export_artifact
from vcompress.spec import strict_json
from vcompress.spec.artifact import Artifact
from vcompress.spec.cache_section import CacheSection
from vcompress.spec.errors import BuildError, InputError

if TYPE_CHECKING:
    # They import torch, which an artifact without a cache does not need here.
    from vcompress.export.cached_graph import CachedFacts
    from vcompress.models.calls import Call

__all__ = ["export_for_server"]

Array = npt.NDArray[Any]


def export_for_server(
    path: Path, output: Path, server: str, *, max_batch: int = 8, force: bool = False
) -> tuple[Path, ...]:
    """As `vcompress.export.serving`, with the plan's cache in the graph where Triton keeps it.

    Raises:
        InputError: as there, or the cache is one that cannot stand in a graph.
        BuildError: the graph computes something else than the module.
    """
    artifact = Artifact.open(path)
    section = _cache_of(artifact)
    if server != "triton" or section is None:
        return export_artifact(path, output, server, max_batch=max_batch, force=force)
    with tempfile.TemporaryDirectory(prefix="vcompress-") as name:
        cached = _export_step(artifact, Path(name) / "step.onnx")
        return export_artifact(path, output, server, force=force, cached=cached)


def _cache_of(artifact: Artifact) -> CacheSection | None:
    plan = artifact.file("plan")
    data = None if plan is None else strict_json.read(plan).get("cache")
    return None if data is None else CacheSection.from_dict(data)


def _export_step(artifact: Artifact, path: Path) -> CachedFacts:
    """One step with the cache inside, proven."""
    from vcompress.export.cached_graph import export_cached
    from vcompress.models.video import PrimaryOutput
    from vcompress.pipeline.compressed import one_precision, without_cache

    module, plan = without_cache(artifact.path)
    if plan.dynamic_precision is not None:
        raise InputError(one_precision("a graph"))
    section = plan.cache
    assert section is not None
    if section.num_steps is None:
        message = (
            f"the cache of {artifact.path} does not say how many steps a run has, and a graph has "
            "to know; set cache.num_steps in its plan.json, and make the artifact with apply"
        )
        raise InputError(message)
    call = _golden_call(artifact)
    facts = export_cached(
        PrimaryOutput(module, call), section, call, path, num_steps=section.num_steps
    )
    _compare(artifact, module, section, call, facts)
    return facts


def _golden_call(artifact: Artifact) -> Call:
    """The first golden call, as large a batch of it as the artifact's graph has."""
    import torch

    from vcompress.models.calls import Call
    from vcompress.spec.call import CallSpec

    spec, golden = CallSpec.from_dict(artifact.manifest["call"]), artifact.manifest["golden"]
    with np.load(artifact.path / golden["file"], allow_pickle=False) as arrays:
        tensors = {
            one.name: torch.from_numpy(arrays[f"{golden['inputs']}.{one.name}"])
            for one in spec.tensors
        }
    (size, *_) = artifact.manifest["inputs"][0]["shape"]
    return Call(
        tensors={one.name: tensors[one.name] for one in spec.tensors if not one.shared},
        shared={one.name: tensors[one.name] for one in spec.tensors if one.shared},
        constants=spec.constants,
    ).repeated(size if isinstance(size, int) else 1)


def _compare(
    artifact: Artifact, module: Any, section: CacheSection, call: Call, facts: CachedFacts
) -> None:
    """Run all steps of a generation in ONNX Runtime and with the cache in Python.

    Raises:
        BuildError: a step differs by more than the golden calls of the artifact may.
    """
    import torch

    from vcompress.compress.cache import apply_cache
    from vcompress.compress.cache.denoiser import TIMESTEPS
    from vcompress.export.runtime import open_session

    assert section.num_steps is not None
    session = open_session(facts.files[0])
    cached = apply_cache(module, section)
    cached.reset(section.num_steps)
    limit, state = artifact.manifest["golden"]["max"], facts.first_state()
    latent = next(iter(call.tensors))
    name = next(each for each in TIMESTEPS if each in call.tensors)
    first = 1000 if float(call.flat[name].max()) > 1 else 1
    for step in range(section.num_steps):
        left = 1 - step / section.num_steps
        # A latent that changes a little and a time that moves on, as in a generation.
        latents = call.flat[latent] * (0.9 + 0.1 * left)
        times = torch.full_like(call.flat[name], first * left)
        now = call.with_flat({**call.flat, latent: latents, name: times})
        with torch.no_grad():
            wanted = module(**now.arguments, return_dict=False)[0].numpy()
        known = {"step": np.array([step]), **state}
        known.update({name: tensor.numpy() for name, tensor in now.flat.items()})
        outputs = session.run_named({name: known[name] for name in session.input_names})
        state = facts.next_state(outputs)
        error = float(np.linalg.norm(outputs["output"] - wanted) / np.linalg.norm(wanted))
        if not error <= limit:
            message = (
                f"step {step} of the graph with the cache {section.policy} inside differs from the "
                f"module by a relative L2 of {error:.1e}, {limit:.0e} is allowed; keep the cache "
                'in Python: vcompress.compressed("...")'
            )
            raise BuildError(message)
    cached.remove()
