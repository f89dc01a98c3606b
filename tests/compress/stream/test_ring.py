"""The ring holds the newest rows in their order and takes memory once."""

from __future__ import annotations

import pytest
import torch

from vcompress.compress.stream.ring import Ring
from vcompress.spec.errors import InputError


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (5, 2, 2, 1), (1,) * 12, (3, 5, 5), (4, 4, 4)])
def test_the_newest_rows_in_order(sizes: tuple[int, ...]) -> None:
    ring, count = Ring(5), 0
    for size in sizes:
        ring.push(torch.arange(count, count + size)[:, None])
        count += size
        assert ring.full == (count >= 5)
        if ring.full:
            assert ring.ordered().flatten().tolist() == list(range(count - 5, count))


def test_memory_is_taken_once() -> None:
    ring = Ring(4)
    ring.push(torch.zeros(4, 2))
    places = ring.ordered().data_ptr(), ring._rows.data_ptr()
    for step in range(50):
        ring.push(torch.full((3, 2), float(step)))
        assert (ring.ordered().data_ptr(), ring._rows.data_ptr()) == places
    # What was read may be changed in place by a model: the ring keeps its own.
    ring.ordered().fill_(-1)
    assert ring.ordered()[-1].tolist() == [49, 49]


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(InputError, match="at least one row, got 0"):
        Ring(0)
    ring = Ring(3)
    ring.push(torch.zeros(1, 2))
    with pytest.raises(InputError, match="at most as many"):
        ring.push(torch.zeros(4, 2))
    with pytest.raises(InputError, match="float64"):
        ring.push(torch.zeros(1, 2, dtype=torch.float64))
