"""GPTQ: a weight rounded column by column, where later columns make up for the errors of earlier.

What: the output error of a rounded weight Q is tr((W - Q) H (W - Q)'), with H the second moment of
the inputs. Columns are rounded in order; the error of each is spread over the columns that are
still free, by the factor U of H^-1 = U' U.
Source: Frantar et al., 2022 (https://arxiv.org/abs/2210.17323). The inputs are the rounded ones,
which the layer will see, and the target is the output of the weight on the inputs as they were:
GPTAQ (Li et al., 2025, https://arxiv.org/abs/2504.02692) and before it "asymmetric calibration".
Sweeps over the columns after that are coordinate descent, as QuantEase (Behdin et al., 2023,
https://arxiv.org/abs/2309.01885).
What we changed: H is shrunk towards its diagonal by as much as the number of tokens asks for
(after Ledoit and Wolf, 2004). The target is a weight, W* = W + W M_lost (M + damping)^-1, found
once by least squares (see `working.Moments`). How far to go there, and with which damping, is
decided between two halves of the tokens, since with few tokens that regression learns noise; at
worst W* is W. Moments are centred: means are for `bias`. Scales of block formats are searched anew
when their block is reached, as its columns have moved by then; others are searched beforehand.
Columns stay in their order: the blocks of the formats are made of neighbours.

Shapes: N output channels, K input channels, B block of the format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vcompress.compress.algorithms.clipping import search_blocks, search_scales
from vcompress.compress.algorithms.rounding import GRIDS, Scales
from vcompress.compress.algorithms.working import Moments, Working

__all__ = ["damped", "gptq", "shifted_target"]

_DAMPING = 0.01  # of the mean diagonal of H
_SHIFT_DAMPINGS = (0.003, 0.03, 0.3)
_NUM_MIXTURES = 64
# Neighbours in a clip are alike: so many of them count as one sample of the inputs.
_TOKENS_A_SAMPLE = 3
# Columns whose updates of later ones are gathered into one product; whole blocks of each format.
_LAZY_COLUMNS = 128
_NUM_SWEEPS = 1


def damped(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """`moment` `[K, K]` with `damping` times its mean diagonal added to the diagonal."""
    amount = damping * float(moment.diagonal().mean())
    result = moment.clone()
    # Constant inputs have no moments at all; any positive definite matrix does there.
    result.diagonal().add_(amount if amount > 0 else 1.0)
    return result


def _shrunk(moment: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`moment` with its off-diagonal part scaled by the share of it that is not sampling noise.

    For normal inputs the noise of an element i, j over T tokens has the mean square
    (M_ii M_jj + M_ij^2) / T.
    """
    diagonal = moment.diagonal()
    outside = float(moment.square().sum() - diagonal.square().sum())
    noise = float(diagonal.sum().square() - diagonal.square().sum()) + outside
    noise *= _TOKENS_A_SAMPLE / max(1, num_tokens)
    share = 1.0 - min(1.0, noise / outside) if outside > 0 else 1.0
    result = moment * share
    result.diagonal().copy_(diagonal)
    return result


def _times_inverse(matrix: torch.Tensor, moment: torch.Tensor, damping: float) -> torch.Tensor:
    """`matrix @ inverse(damped(moment, damping))`."""
    factor, failed = torch.linalg.cholesky_ex(damped(moment, damping))
    if int(failed):
        # Rounding of float32 can cost a nearly singular moment its definiteness.
        factor = torch.linalg.cholesky(damped(moment, max(damping, 0.1)).double()).float()
    return torch.cholesky_solve(matrix.t(), factor).t()


def shifted_target(
    weight: torch.Tensor, folds: tuple[Moments, Moments], moments: Moments
) -> torch.Tensor:
    """The weight `[N, K]` that on rounded inputs best gives what `weight` gives on exact ones.

    Each half of the tokens tries the shift that the other suggests. The damping and the share of
    the shift, from 0 to 1, with the largest gain are taken; gains are sums over the outputs, which
    a few random mixtures of them estimate.
    """
    best_gain, best_damping, best_share = 0.0, 0.0, 0.0
    mixed = _mixtures(weight)
    wanted = [mixed @ fold.lost for fold in folds]
    for damping in _SHIFT_DAMPINGS:
        along = across = 0.0
        for fold, other in ((0, 1), (1, 0)):
            shift = _times_inverse(wanted[fold], folds[fold].rounded, damping)
            along += float((wanted[other] * shift).sum())
            across += float((shift @ folds[other].rounded).mul_(shift).sum())
        share = min(1.0, max(0.0, along / across)) if across > 0 else 0.0
        gain = 2 * share * along - share * share * across
        if gain > best_gain:
            best_gain, best_damping, best_share = gain, damping, share
    if best_share == 0.0:
        return weight
    shift = _times_inverse(weight @ moments.lost, moments.rounded, best_damping)
    return weight + best_share * shift


def _mixtures(weight: torch.Tensor) -> torch.Tensor:
    """`_NUM_MIXTURES` rows whose expected sums of products are those of the rows of `weight`."""
    if len(weight) <= _NUM_MIXTURES:
        return weight
    generator = torch.Generator().manual_seed(len(weight))
    factors = torch.randn(_NUM_MIXTURES, len(weight), generator=generator)
    return factors.to(weight.device) @ weight / math.sqrt(_NUM_MIXTURES)


def gptq(
    working: Working, *, shift: bool = True, num_sweeps: int = _NUM_SWEEPS
) -> tuple[torch.Tensor, Scales]:
    """Round `working.weight`; returns the values `[N, K]` on the grid, and their scales.

    Args:
        working: with at least one token.
        shift: aim at what the layer gave before its inputs were rounded.
        num_sweeps: of coordinate descent afterwards; each costs as much as the rounding, and later
            ones bring little.
    """
    target = working.weight
    if shift:
        target = shifted_target(target, working.folds, working.moments)
    hessian = damped(_shrunk(working.moments.rounded, len(working.inputs)), _DAMPING)
    scales = search_scales(target, working.importance, working.problem.format)
    columns = _Columns(target, scales, working.importance)
    values = _round_columns(columns, hessian)
    for _ in range(num_sweeps):
        _descend(columns, values, target.t() - values, hessian)
    return values.t().contiguous(), columns.scales()


@dataclass
class _Columns:
    """A weight by its columns, in memory too, and their scales.

    Attributes:
        target: `[N, K]`.
        initial: of all blocks, searched beforehand.
        importance: `[K]`.
    """

    target: torch.Tensor
    initial: Scales
    importance: torch.Tensor

    def __post_init__(self) -> None:
        self.grid = GRIDS[self.initial.format]
        self.size = self.grid.block_size if self.grid.block_size > 0 else self.target.shape[1]
        # `[G, N]` or, for one scale a tensor, `[1, 1]`.
        self.by_block = self.initial.blocks.t().contiguous()

    def enter_block(self, column: int, free: torch.Tensor) -> None:
        """Search the scales of the block that begins at `column` and now is `free` `[B, N]`."""
        block = slice(column, column + self.size)
        scale = search_blocks(
            free.t().unsqueeze(1).contiguous(), self.importance[None, block], self.initial.format,
            self.initial.tensor,
        )  # fmt: skip
        self.by_block[column // self.size] = scale.squeeze(1)

    def round(self, column: int, values: torch.Tensor) -> torch.Tensor:
        """`values` `[N]` of `column` on the grid."""
        scale = self.by_block[column // self.size]
        return self.grid.round_elements_(values / scale).mul_(scale)

    def scales(self) -> Scales:
        return Scales(
            format=self.initial.format, blocks=self.by_block.t().contiguous(),
            tensor=self.initial.tensor,
        )  # fmt: skip


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U' U = hessian^-1.

    hessian = R R' with R upper triangular is a Cholesky factorisation from the last row upwards,
    and U = R^-1; one factorisation and one triangular inverse instead of GPTQ's three steps.
    """
    lower = torch.linalg.cholesky(hessian.double().flip(0, 1))
    identity = torch.eye(len(hessian), dtype=torch.float64)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return inverse.float()


def _round_columns(columns: _Columns, hessian: torch.Tensor) -> torch.Tensor:
    """Values `[K, N]` on the grid; scales of blocks are set in `columns`."""
    factor = _inverse_factor(hessian)
    free = columns.target.t().contiguous().clone()
    values = torch.empty_like(free)
    num_columns = len(free)
    for start in range(0, num_columns, _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, num_columns)
        errors = torch.empty_like(free[start:end])
        for column in range(start, end):
            if columns.grid.block_size > 0 and column % columns.size == 0:
                columns.enter_block(column, free[column : column + columns.size])
            rounded = columns.round(column, free[column])
            error = (free[column] - rounded).div_(factor[column, column])
            free[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
            values[column], errors[column - start] = rounded, error
        free[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return values


def _descend(
    columns: _Columns, values: torch.Tensor, left: torch.Tensor, hessian: torch.Tensor
) -> None:
    """Round every column of `values` `[K, N]` again, given all others; `left` = target - values.

    The objective never grows. In place.
    """
    diagonal = hessian.diagonal().tolist()
    gradient = hessian @ left
    for start in range(0, len(values), _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, len(values))
        steps = torch.empty_like(values[start:end])
        local = gradient[start:end]
        for column in range(start, end):
            wanted = values[column] + local[column - start] / diagonal[column]
            rounded = columns.round(column, wanted)
            step = rounded - values[column]
            local.addr_(hessian[start:end, column], step, alpha=-1)
            values[column], steps[column - start] = rounded, step
        gradient[end:].addmm_(hessian[end:, start:end], steps, alpha=-1)
