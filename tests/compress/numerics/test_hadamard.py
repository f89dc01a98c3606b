from __future__ import annotations

import pytest
import torch

from vcompress.compress.numerics import hadamard
from vcompress.spec.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_the_matrix_is_symmetric_and_orthogonal(size: int) -> None:
    matrix = hadamard.matrix(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5))


def test_the_matrix_is_sylvesters() -> None:
    # The sign of an entry is the parity of the bits that its row and column share.
    expected = [
        [1 - 2 * ((row & column).bit_count() % 2) for column in range(8)] for row in range(8)
    ]
    assert torch.allclose(hadamard.matrix(8) * 8**0.5, torch.tensor(expected) * 1.0)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 192), (0, 64)])
def test_rotating_twice_gives_the_input_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rotated = hadamard.rotate(x, 32)
    assert rotated.shape == x.shape
    assert torch.allclose(hadamard.rotate(rotated, 32), x, atol=1e-5)


def test_blocks_stay_apart_and_an_outlier_is_spread() -> None:
    x = torch.zeros(1, 64)
    x[0, 20] = 8.0
    rotated = hadamard.rotate(x, 16)
    assert torch.equal(rotated[0, 16:32].abs(), torch.full((16,), 2.0))
    assert not rotated[0, :16].any()
    assert not rotated[0, 32:].any()


def test_a_product_is_what_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 96, generator=generator), torch.randn(8, 96, generator=generator)
    product = hadamard.rotate(x, 32) @ hadamard.rotate(weight, 32).T
    assert torch.allclose(product, x @ weight.T, atol=1e-4)


def test_type_of_the_input_is_kept_and_gradients_pass() -> None:
    assert hadamard.rotate(torch.ones(2, 16).half(), 16).dtype == torch.float16
    x = torch.ones(2, 16, requires_grad=True)
    hadamard.rotate(x, 16).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("size", "problem"), [(24, "power of two"), (0, "power"), (64, "divide")])
def test_sizes_that_do_not_fit(size: int, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        hadamard.rotate(torch.ones(2, 48), size or hadamard.matrix(0).shape[0])
