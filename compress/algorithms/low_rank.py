"""A low-rank branch in floating point beside the rounded weight.

What: y = Q xq + up (down x), where the branch, of rank 16 or 32, takes over what is hardest to
round, and sees the input before it is rounded.
Source: SVDQuant (Li et al., 2024, https://arxiv.org/abs/2411.05007): the branch is the truncated
SVD of the smoothed weight.
What we changed: SVDQuant refines by taking the SVD of what rounding lost and rounding again. Here
the weight is rounded once, and the branch is then fitted to the error of the output that is left,
the error of the rounded input included: a reduced-rank regression (Izenman, 1975), closed form by
one SVD, with damping towards the branch as it was. Rounding again after that was tried and loses
what the fit had gained.

Shapes: N output channels, K input channels, R rank, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vcompress.compress.algorithms.gptq import damped
from vcompress.compress.algorithms.problem import LayerProblem
from vcompress.compress.algorithms.working import Working
from vcompress.compress.numerics import hadamard

__all__ = ["low_rank_branch", "with_fitted_branch"]

_DAMPING = 0.1

Branch = tuple[torch.Tensor, torch.Tensor]


def low_rank_branch(problem: LayerProblem, smoothing: torch.Tensor | None, *, rank: int) -> Branch:
    """Down `[R, K]` and up `[N, R]`: the truncated SVD of the smoothed weight.

    Args:
        smoothing: `[K]`, or None.
        rank: 16 or 32; lower where the layer is smaller. More is more accurate and costs time and
            (N + K) * R numbers of memory.
    """
    weight = problem.weight if smoothing is None else problem.weight / smoothing
    return _truncated(weight, min(rank, *weight.shape))


def with_fitted_branch(working: Working, values: torch.Tensor) -> Working:
    """`working` with the branch that goes best with `values` `[N, K]`, its rounded weight.

    Args:
        working: with a branch and at least one token.
    """
    assert working.low_rank is not None
    down, up = working.low_rank
    mean, mean_rounded = working.means
    exact = working.inputs - mean
    missing = exact @ working.weight.t() - (working.rounded - mean_rounded) @ values.t()
    # The branch works on inputs that are not rotated; a rotation is its own inverse.
    inputs = _rotated(exact, working.rotation)
    moment = damped(inputs.t() @ inputs / len(inputs), _DAMPING)
    factor = torch.linalg.cholesky(moment.double())
    cross = (missing.t() @ inputs / len(inputs)).double()
    # In coordinates in which the inputs are white, the best branch is a truncated SVD.
    gain = torch.linalg.solve_triangular(factor.t(), cross, upper=True, left=False)
    down_white, fitted_up = _truncated(((up @ down).double() @ factor + gain).float(), len(down))
    fitted_down = torch.linalg.solve_triangular(
        factor, down_white.double(), upper=False, left=False
    ).float()
    change = _rotated(up @ down - fitted_up @ fitted_down, working.rotation)
    return replace(working, weight=working.weight + change, low_rank=(fitted_down, fitted_up))


def _rotated(rows: torch.Tensor, size: int | None) -> torch.Tensor:
    return rows if size is None else hadamard.rotate(rows, size)


def _truncated(matrix: torch.Tensor, rank: int) -> Branch:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root
