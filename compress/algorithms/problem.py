"""What an algorithm is asked and what it answers, and the error that the answer is judged by.

What: the error is that of the layer's output, measured with the frozen layer that a plan would
make, on inputs that were not used to find the answer; every algorithm here is compared by it.

Shapes: T tokens, N output channels, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional

from vcompress.compress.frozen import freeze
from vcompress.spec.errors import InputError
from vcompress.spec.formats import FORMATS
from vcompress.spec.strict_json import significant

__all__ = ["LayerProblem", "Solution", "output_error", "split_tokens"]

_NUM_CHUNKS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """One linear layer, what it saw in calibration, and the format that it shall have.

    Attributes:
        weight: `[N, K]` float32.
        bias: `[N]`, or None.
        inputs: `[T, K]` float32, calibration tokens in the order of the clips; T may be 0.
        input_amax: largest magnitude over all of calibration, at least that of `inputs`.
        format: a name in `spec.formats.FORMATS` that the layer can take.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    inputs: torch.Tensor
    input_amax: float
    format: str

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.inputs.shape[1:] != self.weight.shape[1:]:
            message = (
                f"calibration inputs must be [T, {self.weight.shape[1]}], got "
                f"{list(self.inputs.shape)}; flatten them to tokens"
            )
            raise InputError(message)
        if not bool(self.weight.isfinite().all()):
            message = "the weight must be finite, got NaN or infinity; repair the checkpoint"
            raise InputError(message)
        if not math.isfinite(self.input_amax) or not bool(self.inputs.isfinite().all()):
            message = (
                "calibration inputs must be finite, got NaN or infinity; calibrate with clips on "
                "which the model's activations are finite"
            )
            raise InputError(message)
        objection = FORMATS[self.format].objection("linear", tuple(self.weight.shape))
        if objection:
            message = f"{objection}; choose another format or keep the layer"
            raise InputError(message)

    @property
    def num_channels(self) -> int:
        """K."""
        return self.weight.shape[1]

    def with_inputs(self, inputs: torch.Tensor) -> LayerProblem:
        """The same layer, with other tokens."""
        return replace(self, inputs=inputs)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """How the layer is to be frozen.

    Attributes:
        rotation: block size of the online rotation of the input, or None.
        tensors: parts as in `compress.tensors`.
        input_amax: of the smoothed and rotated input; six significant digits, as plans have.
        smoothed_amax: of the smoothed input, where it is rotated as well; a plan has it for those
            who take the rotation out.
        note: what was done and what came of it, for the plan's reason.
        gain: error of plain rounding over that of this answer, where both were measured.
    """

    rotation: int | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    input_amax: float
    note: str
    gain: float = 1.0
    smoothed_amax: float | None = None

    def __post_init__(self) -> None:
        # What is measured here shall be what a plan says, to the last bit.
        object.__setattr__(self, "input_amax", significant(self.input_amax))


def output_error(problem: LayerProblem, solution: Solution, inputs: torch.Tensor) -> float:
    """Relative L2 error of the layer's output on `inputs` `[T, K]`; NaN if the layer breaks.

    Where the output is zero everywhere, the norm of the error itself.

    Raises:
        InputError: `solution` does not fit the layer.
    """
    layer = nn.Linear(problem.num_channels, len(problem.weight), bias=problem.bias is not None)
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        layer.bias = nn.Parameter(problem.bias.float(), requires_grad=False)
    frozen = freeze(
        layer, problem.format, solution.input_amax, rotation=solution.rotation,
        tensors=solution.tensors,
    )  # fmt: skip
    with torch.inference_mode():
        expected = functional.linear(inputs, layer.weight, layer.bias)
        error = torch.linalg.vector_norm(frozen(inputs) - expected)
        size = torch.linalg.vector_norm(expected)
    return float(error / size) if size > 0 else float(error)


def split_tokens(problem: LayerProblem, seed: int) -> tuple[LayerProblem, torch.Tensor]:
    """Two thirds of the tokens to fit, and the others `[T / 3, K]` to judge by.

    Whole runs of tokens are held out, as neighbours in a clip are nearly alike. With fewer than
    three tokens there is nothing to hold out, and all of them are in both parts.
    """
    num_tokens = len(problem.inputs)
    if num_tokens < 3:
        return problem, problem.inputs
    chunks = problem.inputs.tensor_split(min(_NUM_CHUNKS, num_tokens))
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[: len(chunks) // 3])
    fit = torch.cat([chunk for index, chunk in enumerate(chunks) if index not in held_out])
    return problem.with_inputs(fit), torch.cat([chunks[index] for index in sorted(held_out)])
