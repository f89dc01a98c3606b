"""The proof: every form of the model is run on the same test clips and compared.

baseline torch -> baseline ONNX -> planned torch -> portable ONNX (the result) -> TensorRT ONNX.
The judge, `vcompress.validate`, is handed arrays and callables; it shares no code with what it
judges. A format that this machine only simulates gets no latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from vcompress.calib.calls import Samples
from vcompress.export.runtime import INTEGER_KERNELS, Session
from vcompress.models.calls import Batch, named_arrays
from vcompress.models.video import VideoModel
from vcompress.pipeline.equivalence import (
    agreement_of,
    parity_of,
    probes_of,
    run_session,
    run_torch,
)
from vcompress.pipeline.performance import modes_of, peak_memory
from vcompress.spec.clip import ClipSpec
from vcompress.spec.formats import FLOAT
from vcompress.spec.plan import CompressionPlan
from vcompress.validate.latency import LatencyStatistics, measure_interleaved
from vcompress.validate.metrics import Metrics, compare_outputs
from vcompress.validate.report import build_stage
from vcompress.validate.report_types import Memory, Mode, Stage

__all__ = ["BASELINE", "RESULT", "Forms", "Proof", "prove", "why_simulated"]

Array = npt.NDArray[Any]

BASELINE = "baseline torch"
BASELINE_ONNX = "baseline ONNX"
PLANNED = "planned torch"
RESULT = "portable ONNX"
TENSORRT = "TensorRT ONNX"

_BATCH_SIZE = 16
_WARM_UP = 5
_ROUNDS = 20
_MIN_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The forms of one model that are compared.

    Attributes:
        baseline, planned: torch.
        baseline_session: the unquantized graph in ONNX Runtime.
        portable_session: the planned graph in ONNX Runtime.
        baseline_path, portable_path, tensorrt_path: the files.
        tensorrt_session: the graph for TensorRT, where ONNX Runtime can run it; else None, and
            `tensorrt_reason` says why.
    """

    baseline: VideoModel
    planned: VideoModel
    baseline_session: Session
    baseline_path: Path
    portable_session: Session
    portable_path: Path
    tensorrt_session: Session | None
    tensorrt_path: Path
    tensorrt_reason: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was measured.

    Attributes:
        stages: for the report.
        metrics: of the result against the baseline.
        baseline_outputs, result_outputs: on all test clips.
    """

    stages: tuple[Stage, ...]
    metrics: Metrics
    baseline_outputs: Array
    result_outputs: Array


def prove(
    forms: Forms, plan: CompressionPlan, test: Samples, on_clips: Callable[[int], None]
) -> Proof:
    """Run and compare all forms on `test`; `on_clips` is told after each batch.

    Raises:
        BuildError: an ONNX graph does not compute what its module computes.
    """
    baseline = _run(lambda x: run_torch(forms.baseline, x), test, on_clips)
    planned = _run(lambda x: run_torch(forms.planned, x), test, on_clips)
    result = _run(lambda x: run_session(forms.portable_session, x), test, on_clips)
    probes = probes_of(test)
    baseline_parity = parity_of(forms.baseline, forms.baseline_session, None, probes, BASELINE_ONNX)
    result_parity = parity_of(
        forms.planned, forms.portable_session, forms.portable_path, probes, RESULT
    )
    timed, reason = _performance(forms, plan, probes[0][:1])
    labels = None if test.labels is None else np.array(test.labels)
    task, inputs = forms.baseline.task, forms.baseline.inputs
    layout = inputs.layout if isinstance(inputs, ClipSpec) else None

    def metrics(reference: Array, candidate: Array) -> Metrics:
        return compare_outputs(reference, candidate, labels=labels, task=task, layout=layout)

    stages = (
        build_stage(
            BASELINE, about="the model as it was loaded, float32", runtime=_torch_runtime(),
            metrics=metrics(baseline, baseline),
            latency_reason="timed as an ONNX graph, like the result",
        ),
        build_stage(
            BASELINE_ONNX, about="the same, exported",
            runtime=_session_runtime(forms.baseline_session),
            metrics_reason="checked by parity only", parity=baseline_parity,
            latency_reason=reason, batch_size=1, **timed[BASELINE_ONNX],
        ),
        build_stage(
            PLANNED, about="the plan applied", runtime=_torch_runtime(),
            metrics=metrics(baseline, planned),
            latency_reason="torch runs the formats as fake quantization",
        ),
        build_stage(
            RESULT, about="the plan in standard ONNX operators",
            runtime=_session_runtime(forms.portable_session),
            metrics=metrics(baseline, result), metrics_versus_previous=metrics(planned, result),
            parity=result_parity, agreement=agreement_of(
                forms.planned, forms.portable_path, test, planned, result
            ),
            latency_reason=reason, batch_size=1, **timed[RESULT],
        ),
        _tensorrt_stage(forms, probes),
    )  # fmt: skip
    return Proof(
        stages=stages,
        metrics=metrics(baseline, result),
        baseline_outputs=baseline,
        result_outputs=result,
    )


def _tensorrt_stage(forms: Forms, probes: list[Batch]) -> Stage:
    parity = None
    if forms.tensorrt_session is not None:
        parity = parity_of(
            forms.planned, forms.tensorrt_session, forms.tensorrt_path, probes, TENSORRT
        )
    return build_stage(
        TENSORRT,
        about="the plan in the operators that TensorRT fuses",
        runtime=None
        if forms.tensorrt_session is None
        else _session_runtime(forms.tensorrt_session),
        metrics_reason=forms.tensorrt_reason or "checked by parity only",
        parity=parity,
        latency_reason="needs the GPU that the engine was built for",
    )


def _run(
    runner: Callable[[Batch], Array], samples: Samples, on_clips: Callable[[int], None]
) -> Array:
    outputs: list[Array] = []
    for batch in samples.tensors(_BATCH_SIZE):
        outputs.append(runner(batch))
        on_clips(len(batch))
    return np.concatenate(outputs)


class _Timed(TypedDict, total=False):
    """What a stage that really runs here has on its speed."""

    latency: LatencyStatistics
    modes: list[Mode]
    memory: Memory


def _performance(
    forms: Forms, plan: CompressionPlan, sample: Batch
) -> tuple[dict[str, _Timed], str | None]:
    """Latency, modes and memory of both graphs, or the reason why there is none."""
    reason = why_simulated(forms.portable_session, plan)
    if reason is not None:
        return {BASELINE_ONNX: {}, RESULT: {}}, reason
    sessions = {BASELINE_ONNX: forms.baseline_session, RESULT: forms.portable_session}
    paths = {BASELINE_ONNX: forms.baseline_path, RESULT: forms.portable_path}
    latency = measure_interleaved(
        {
            name: partial(session.run_named, named_arrays(sample, session.input_names))
            for name, session in sessions.items()
        },
        warm_up=_WARM_UP,
        rounds=_ROUNDS,
        min_seconds=_MIN_SECONDS,
    )
    modes = modes_of(sessions, sample, latency)
    return {
        name: _Timed(
            latency=latency[name], modes=modes[name],
            memory=peak_memory(paths[name], session, sample),
        )
        for name, session in sessions.items()
    }, None  # fmt: skip


def why_simulated(session: Session | None, plan: CompressionPlan) -> str | None:
    """Why the portable graph's time says nothing of the plan, or None if it really runs so.

    Without a session only the formats of the plan are looked at.
    """
    formats = {choice.format for choice in plan.quantize.values()} - {FLOAT}
    formats |= {choice.format for choice in (plan.attention or {}).values()} - {FLOAT}
    without_kernel = sorted(formats - {"int8"})
    if without_kernel:
        return (
            f"simulated: ONNX Runtime has no {' or '.join(without_kernel).upper()} kernel on a "
            "CPU; "
            "this graph checks numbers, not speed"
        )
    if (
        session is not None
        and formats
        and not any(name in INTEGER_KERNELS for name in session.kernels())
    ):
        return (
            "simulated: ONNX Runtime fused no integer kernel on this CPU; OpenVINO has more of "
            "them (vcompress export --runtime openvino)"
        )
    return None


def _torch_runtime() -> str:
    return f"torch {torch.__version__}, CPU"


def _session_runtime(session: Session) -> str:
    return f"ONNX Runtime, {', '.join(session.providers)}"
