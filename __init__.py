"""vcompress: compress a trained video model and prove what it can still do.

    import vcompress
    options = vcompress.Options(target="nvfp4", calib="clips/", output="out/")
    outcome = vcompress.quantize("model.pt", options=options)
    print(outcome.verdict.reason, outcome.path)

The public names below are imported when they are first used: `import vcompress` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcompress.compress.kernels.execute import execute
    from vcompress.export.deployed import open_deployed as load_artifact
    from vcompress.models.load import LoadOptions, load_model, wrap_module
    from vcompress.models.recording import record_calls
    from vcompress.pipeline import Options, Outcome, apply, apply_plan, make_plan, quantize
    from vcompress.pipeline.cache import cached, find_cache
    from vcompress.pipeline.compressed import compressed
    from vcompress.pipeline.revalidate import validate as validate_artifact
    from vcompress.pipeline.sensitivity import sensitivity
    from vcompress.pipeline.stream import stream
    from vcompress.pipeline.tokens import find_tokens
    from vcompress.spec.artifact import Artifact
    from vcompress.spec.plan import CompressionPlan

__version__ = "0.1.0"

__all__ = [
    "Artifact", "CompressionPlan", "LoadOptions", "Options", "Outcome", "apply", "apply_plan",
    "cached", "compressed", "execute", "find_cache", "find_tokens", "load_artifact", "load_model",
    "make_plan", "quantize", "record_calls", "sensitivity", "stream", "validate_artifact",
    "wrap_module",
]  # fmt: skip

_HOMES = {
    "Artifact": "vcompress.spec.artifact:Artifact",
    "CompressionPlan": "vcompress.spec.plan:CompressionPlan",
    "LoadOptions": "vcompress.models.load:LoadOptions",
    "Options": "vcompress.pipeline:Options",
    "Outcome": "vcompress.pipeline:Outcome",
    "apply": "vcompress.pipeline:apply",
    "apply_plan": "vcompress.pipeline:apply_plan",
    "cached": "vcompress.pipeline.cache:cached",
    "compressed": "vcompress.pipeline.compressed:compressed",
    "execute": "vcompress.compress.kernels.execute:execute",
    "find_cache": "vcompress.pipeline.cache:find_cache",
    "find_tokens": "vcompress.pipeline.tokens:find_tokens",
    "load_artifact": "vcompress.export.deployed:open_deployed",
    "load_model": "vcompress.models.load:load_model",
    "make_plan": "vcompress.pipeline:make_plan",
    "quantize": "vcompress.pipeline:quantize",
    "record_calls": "vcompress.models.recording:record_calls",
    "sensitivity": "vcompress.pipeline:sensitivity",
    "stream": "vcompress.pipeline.stream:stream",
    "validate_artifact": "vcompress.pipeline.revalidate:validate",
    "wrap_module": "vcompress.models.load:wrap_module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'vcompress' has no attribute {name!r}"
        raise AttributeError(message)
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
