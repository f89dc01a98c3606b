"""From a trained model to a proven artifact: `order` calls the rest in its order."""

from __future__ import annotations

from vcompress.pipeline.order import apply, quantize, write_plan
from vcompress.pipeline.planning import apply_plan, make_plan
from vcompress.pipeline.run import Options, Outcome, Progress
from vcompress.pipeline.sensitivity import SensitivityTable, sensitivity
from vcompress.pipeline.timing import measure_latency
from vcompress.pipeline.tokens import TokenSchedule, find_tokens

__all__ = [
    "Options", "Outcome", "Progress", "SensitivityTable", "TokenSchedule", "apply", "apply_plan",
    "find_tokens", "make_plan", "measure_latency", "quantize", "sensitivity", "write_plan",
]  # fmt: skip
