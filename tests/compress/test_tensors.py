from __future__ import annotations

import pytest
import torch

from vcompress.compress.tensors import flatten, select, unflatten, words
from vcompress.spec.errors import InputError

PARTS = {
    part: torch.full((2,), float(index))
    for index, part in enumerate(
        ("input_smoothing", "low_rank_down", "low_rank_up", "bias", "weight_packed", "weight_scale")
    )
}


def test_words_stand_in_the_order_of_the_plan() -> None:
    assert words(list(reversed(PARTS))) == ("input_smoothing", "low_rank", "bias", "weight")
    assert words(["weight_scale"]) == ("weight",)
    assert words([]) == words(["weight", "smoothing"]) == ()


def test_a_deleted_word_takes_its_parts_away() -> None:
    assert select(PARTS, words(PARTS)) == PARTS
    assert set(select(PARTS, ("low_rank", "weight"))) == set(PARTS) - {"input_smoothing", "bias"}
    assert select(PARTS, ()) == {}


def test_names_survive_the_file() -> None:
    tensors = {"blocks.0.fc": PARTS, "a:b": {"bias": torch.ones(3).expand(3)}}
    back = unflatten(flatten(tensors))
    assert {layer: set(parts) for layer, parts in back.items()} == {
        layer: set(parts) for layer, parts in tensors.items()
    }
    assert torch.equal(back["a:b"]["bias"], torch.ones(3))


@pytest.mark.parametrize("name", ["blocks.0.fc", "fc:unknown", ""])
def test_a_file_of_something_else(name: str) -> None:
    with pytest.raises(InputError, match="is not layer:part"):
        unflatten({name: torch.ones(1)})
