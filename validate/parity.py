"""Does one form of a model compute what another form computes?

What: relative L2 difference of the outputs on two or more different inputs; one input alone is
passed by a graph into which that input was baked.
Rounding ties: two correct kernels that round to integers may put a value that lies between two
codes on different sides, which changes the output by a step. Such a step is knife-edged, a wrong
export is not: so a difference above the tolerance is taken for ties only if it is shown, by the
caller's `find_tie` or by its vanishing when the input is moved a little.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vcompress.spec.errors import InputError
from vcompress.validate.metrics import cosine_per_clip, relative_l2

__all__ = ["InputParity", "ParityResult", "check_parity"]

# What is run: an array, or anything else that both forms take.
_Input = TypeVar("_Input")

# The input is moved by this share of its root mean square: far more than a rounding error of
# float32, far less than a step of a quantizer.
_NUDGE = 1e-5
_NUDGES = 3


@dataclass(frozen=True, kw_only=True)
class InputParity:
    """The outcome for one input.

    Attributes:
        relative_l2: `|reference - candidate| / |reference|`; infinite where the outputs cannot be
            compared (shape, NaN) or the reference is zero.
        max_abs: largest absolute difference, in units of the output.
        cosine: of the two outputs as vectors.
        verdict: "pass", "ties" or "fail".
        note: what was shown about ties, or why the outputs cannot be compared.
    """

    relative_l2: float
    max_abs: float
    cosine: float
    verdict: Literal["pass", "ties", "fail"]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """The outcome over all inputs.

    Attributes:
        verdict: "pass" if every input passes, "ties" if the rest is shown to be rounding ties,
            else "fail".
        tolerance: largest relative L2 that passes.
        tie_tolerance: largest relative L2 that shown ties may cause; None where ties are no excuse.
        inputs: the outcome for each input.
    """

    verdict: Literal["pass", "ties", "fail"]
    tolerance: float
    tie_tolerance: float | None
    inputs: tuple[InputParity, ...]

    @property
    def relative_l2_max(self) -> float:
        """The worst relative L2 difference over the inputs."""
        return max(one.relative_l2 for one in self.inputs)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report; infinities are None."""
        worst = self.relative_l2_max
        return {
            "verdict": self.verdict,
            "relative_l2_max": worst if math.isfinite(worst) else None,
            "tolerance_relative_l2": self.tolerance,
            "tie_tolerance_relative_l2": self.tie_tolerance,
            "inputs": [
                {
                    "relative_l2": one.relative_l2 if math.isfinite(one.relative_l2) else None,
                    "max_abs": one.max_abs if math.isfinite(one.max_abs) else None,
                    "cosine": one.cosine if math.isfinite(one.cosine) else None,
                    "verdict": one.verdict,
                    "note": one.note,
                }
                for one in self.inputs
            ],
        }


def check_parity(
    reference: Callable[[_Input], NDArray[Any]],
    candidate: Callable[[_Input], NDArray[Any]],
    inputs: Sequence[_Input],
    *,
    tolerance: float,
    tie_tolerance: float | None = None,
    find_tie: Callable[[_Input], str | None] | None = None,
    equal: Callable[[Any, Any], bool] = np.array_equal,
) -> ParityResult:
    """Compare two forms of a model on at least two different inputs.

    Args:
        reference: the form that is believed, input -> output.
        candidate: the form under test, same shapes.
        inputs: what both are run on; at least two, no two equal.
        tolerance: largest relative L2 difference that passes.
        tie_tolerance: largest difference that rounding ties may cause, above `tolerance`; None
            where both forms must round alike.
        find_tie: called with an input whose difference lies between the tolerances; says where a
            value was rounded the other way, or None if it finds none. By default the input is
            moved by 1e-5 of its size, three times: a tie is shown if the difference then falls
            below `tolerance` at least once; inputs that are no arrays are not moved.
        equal: whether two inputs are the same.

    Raises:
        InputError: fewer than two inputs, two equal ones, tolerances that are not ordered, or a
            reference whose output does not depend on its input.
    """
    _check_arguments(inputs, tolerance, tie_tolerance, equal)
    expected = [np.asarray(reference(array)) for array in inputs]
    if all(np.array_equal(expected[0], other, equal_nan=True) for other in expected[1:]):
        message = (
            f"parity needs inputs that the reference tells apart; it gives the same output for all "
            f"{len(inputs)}; use other clips"
        )
        raise InputError(message)
    results = []
    for array, want in zip(inputs, expected, strict=True):
        one = _compare(want, np.asarray(candidate(array)), tolerance)
        if tie_tolerance is not None and tolerance < one.relative_l2 <= tie_tolerance:
            shown = (
                _settles(reference, candidate, array, tolerance)
                if find_tie is None
                else find_tie(array)
            )
            one = InputParity(
                relative_l2=one.relative_l2,
                max_abs=one.max_abs,
                cosine=one.cosine,
                verdict="fail" if shown is None else "ties",
                note=shown or "no rounding tie was found that explains the difference",
            )
        results.append(one)
    verdicts = {one.verdict for one in results}
    verdict: Literal["pass", "ties", "fail"] = "pass"
    if verdicts != {"pass"}:
        verdict = "fail" if "fail" in verdicts else "ties"
    return ParityResult(
        verdict=verdict, tolerance=tolerance, tie_tolerance=tie_tolerance, inputs=tuple(results)
    )


def _check_arguments(
    inputs: Sequence[Any], tolerance: float, tie_tolerance: float | None,
    equal: Callable[[Any, Any], bool],
) -> None:  # fmt: skip
    if len(inputs) < 2:
        message = f"parity needs at least two different inputs, got {len(inputs)}"
        raise InputError(message)
    for (i, a), (j, b) in itertools.combinations(enumerate(inputs), 2):
        if equal(a, b):
            message = (
                f"parity needs different inputs; inputs {i} and {j} are equal; use other clips"
            )
            raise InputError(message)
    if not tolerance >= 0 or (tie_tolerance is not None and not tie_tolerance >= tolerance):
        message = (
            "tolerances must be 0 <= tolerance <= tie_tolerance, got "
            f"{tolerance} and {tie_tolerance}"
        )
        raise InputError(message)


def _compare(want: NDArray[Any], got: NDArray[Any], tolerance: float) -> InputParity:
    problem = None
    if want.shape != got.shape:
        problem = f"the reference's output has shape {want.shape}, the candidate's {got.shape}"
    elif not (np.isfinite(want).all() and np.isfinite(got).all()):
        problem = "an output has NaN or infinite values"
    if problem is not None:
        return InputParity(
            relative_l2=math.inf, max_abs=math.inf, cosine=math.nan, verdict="fail", note=problem
        )
    difference = relative_l2(want[None], got[None])
    return InputParity(
        relative_l2=difference,
        max_abs=float(np.abs(want.astype(np.float64) - got.astype(np.float64)).max(initial=0.0)),
        cosine=float(cosine_per_clip(want[None], got[None])[0]),
        verdict="pass" if difference <= tolerance else "fail",
    )


def _settles(
    reference: Callable[[Any], NDArray[Any]], candidate: Callable[[Any], NDArray[Any]], array: Any,
    tolerance: float,
) -> str | None:  # fmt: skip
    """Say how far the difference falls beside `array`, or None if it never passes there."""
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
        return None
    rng = np.random.default_rng(0)
    size = float(np.sqrt(np.mean(np.square(array.astype(np.float64)))))
    best = math.inf
    for _ in range(_NUDGES):
        noise = rng.standard_normal(array.shape) * (_NUDGE * size)
        beside = (array + noise).astype(array.dtype)
        want, got = np.asarray(reference(beside)), np.asarray(candidate(beside))
        best = min(best, _compare(want, got, tolerance).relative_l2)
    if best > tolerance:
        return None
    moved = f"with the input moved by {_NUDGE:g} of its size"
    return f"a rounding tie: {moved} the difference is {best:.2g}"
