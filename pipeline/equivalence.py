"""Does an exported graph compute what its module computes?

On single samples: the outputs are the same to the last bits of a float, or rounding ties are shown
to be all that differs. On all test clips of a classifier: so are the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vcompress.calib.calls import Samples
from vcompress.export.locate import locate
from vcompress.export.runtime import Session
from vcompress.export.ties import count_ties
from vcompress.models.calls import Batch, Call, equal_batches, named_arrays
from vcompress.models.video import PrimaryOutput, VideoModel
from vcompress.spec.errors import BuildError
from vcompress.validate.agreement import Agreement, check_agreement
from vcompress.validate.parity import ParityResult, check_parity

__all__ = ["agreement_of", "parity_of", "probes_of", "run_session", "run_torch"]

Array = npt.NDArray[Any]

# Relative L2 difference of the outputs. Float arithmetic differs in its last bits from one runtime
# to the next, which can turn the rounding of a value that lies between two codes; one such step
# spreads through the layers behind it (measured: 0.1 after twelve NVFP4 blocks with random
# weights). So a difference between the last two counts only if every differing code is shown to
# be such a tie and nothing is left of the difference once the codes are the same.
FLOAT_TOLERANCE = 1e-5
PLANNED_TOLERANCE = 1e-3
TIE_TOLERANCE = 0.2


def run_torch(model: VideoModel, batch: Batch) -> Array:
    """The output of `model` as float32."""
    output: Array = model(batch).float().numpy()
    return output


def run_session(session: Session, batch: Batch | Array) -> Array:
    """Run a batch of any size, one sample at a time where the graph's batch size is fixed."""
    parts: Sequence[Batch | Array] = [batch]
    if not session.batch_is_dynamic:
        parts = [batch[index : index + 1] for index in range(len(batch))]
    outputs = (session.run_named(named_arrays(part, session.input_names)) for part in parts)
    return np.concatenate([output[session.output_names[0]] for output in outputs])


def probes_of(test: Samples) -> list[Batch]:
    """Two or three different clips or calls of `test`, each as a batch of one."""
    probes: list[Batch] = []
    for sample in test.tensors(1):
        if not any(equal_batches(sample, other) for other in probes):
            probes.append(sample)
        if len(probes) == 3:
            break
    if len(probes) < 2:
        # One alone would also pass a graph that it was baked into.
        probes.append(_another(probes[0]))
    return probes


def _another(sample: Batch) -> Batch:
    """A different sample of the same shapes and types."""
    if isinstance(sample, Call):
        first, *_ = sample.tensors
        latents = sample.tensors[first]
        return sample.with_flat({**sample.flat, first: latents.flip(-1) + 1})
    return sample.flip(-1) + 1


def parity_of(
    model: VideoModel, session: Session, quantized_path: Path | None, probes: list[Batch], name: str
) -> ParityResult:
    """Parity of `session` with `model`; only a quantized graph may round ties the other way.

    Raises:
        BuildError: the graph does not compute what its module computes.
    """
    tolerance = FLOAT_TOLERANCE if quantized_path is None else PLANNED_TOLERANCE
    tie_tolerance = None if quantized_path is None else TIE_TOLERANCE

    def find_tie(x: Batch) -> str | None:
        assert quantized_path is not None
        return count_ties(PrimaryOutput(model.module, x), quantized_path, x).explanation()

    result = check_parity(
        lambda x: run_torch(model, x),
        lambda x: run_session(session, x),
        probes,
        tolerance=tolerance,
        tie_tolerance=tie_tolerance,
        find_tie=find_tie,
        equal=equal_batches,
    )
    if result.verdict == "fail":
        first = None
        if quantized_path is not None:
            first = locate(PrimaryOutput(model.module, probes[0]), quantized_path, probes[0]).first
        message = (
            f"{name} does not compute what its module computes: relative L2 difference "
            f"{result.relative_l2_max:.2e}, allowed {tolerance:.0e}"
            f"{'' if tie_tolerance is None else ', and it is not explained by rounding ties'}"
            f"{'' if first is None else f'; it departs first at {first}'}; "
            "this is a fault of the export, please report it with the model's architecture"
        )
        raise BuildError(message)
    return result


def agreement_of(
    planned: VideoModel, path: Path, test: Samples, reference: Array, result: Array
) -> Agreement | None:
    """Agreement of a classifier with its file; clips with two answers must hang on ties.

    Args:
        planned: in torch.
        path: its portable ONNX file.
        test: the clips.
        reference, result: outputs of both, `[N, classes]`.

    Raises:
        BuildError: ties do not explain every answer that differs.
    """
    if planned.task != "classify":
        return None

    def is_tied(number: int) -> bool:
        (clip,) = test.subset([number]).tensors(1)
        return count_ties(PrimaryOutput(planned.module, clip), path, clip).all_explained

    found = check_agreement(reference, result, is_tied)
    if found.verdict == "fail":
        message = (
            f"{path.name} names another class than its module for {found.num_differing} of "
            f"{found.num_clips} clips, and of {found.num_looked_at} of them rounding ties explain "
            f"{found.num_tied}; this is a fault of the export, please report it with the model's "
            "architecture"
        )
        raise BuildError(message)
    return found
