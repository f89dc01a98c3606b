"""The judge of `benchmarks/precision.py`: every candidate runs on the same held-out clips."""

from __future__ import annotations

import math
from typing import Any

import torch

from vcompress.benchmarks.zoo import BenchModel
from vcompress.compress.losses import loss_of
from vcompress.compress.numerics import int8
from vcompress.models.video import VideoModel
from vcompress.validate.metrics import sqnr_db

__all__ = ["Judge", "finite", "warm_up"]

_BATCH_SIZE = 8


class Judge:
    """Compares models with the uncompressed one on the test clips of a benchmark model."""

    def __init__(self, bench: BenchModel) -> None:
        self._bench = bench
        self._loss = loss_of(bench.model.task)
        self._batches = list(bench.test.tensors(_BATCH_SIZE))
        self._reference = self._outputs(bench.model)
        self._done = self._task(bench.model, self._reference)

    def facts(self) -> dict[str, Any]:
        """What all candidates of the model have in common."""
        name, value = self._metric(self._done)
        return {
            "loss": self._loss.name,
            "metric": name,
            "baseline_metric": finite(value),
            "num_clips": {
                "calibration": len(self._bench.calibration),
                "test": len(self._bench.test),
            },
        }

    def judge(self, candidate: VideoModel) -> dict[str, Any]:
        """Loss, SQNR of the output in dB and task metric; None for what is not finite."""
        return self.judge_clips(candidate)[0]

    def judge_clips(self, candidate: VideoModel) -> tuple[dict[str, Any], torch.Tensor]:
        """The same, and the loss of each clip, float64 `[N]`."""
        output = self._outputs(candidate)
        broken = not bool(output.isfinite().all())
        losses = self._loss.values(self._reference, output).double()
        return {
            "loss": finite(float(losses.mean())),
            "sqnr_db": None if broken else finite(sqnr_db(self._reference, output)),
            "metric": finite(self._metric(self._task(candidate, output))[1]),
        }, losses

    def _outputs(self, model: VideoModel) -> torch.Tensor:
        return torch.cat([model(batch) for batch in self._batches])

    def _task(self, model: VideoModel, output: torch.Tensor) -> torch.Tensor:
        return output if self._bench.run is None else self._bench.run(model)

    def _metric(self, done: torch.Tensor) -> tuple[str, float]:
        return self._bench.task_metric(self._done, done, self._bench.labels)


def finite(value: float) -> float | None:
    """Six significant digits; JSON has neither NaN nor infinities."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def warm_up() -> None:
    """Call one of our operators: torch imports its compiler then, once, for seconds."""
    int8.quantize_dequantize(torch.ones(1, 2), int8.input_scale(1.0), 0)
