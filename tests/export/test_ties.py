from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vcompress.compress.frozen import FrozenLayer
from vcompress.export.ties import count_ties

Exporter = Callable[[str, str, str], Any]


def test_a_wrong_scale_is_no_tie(exported: Exporter, clips: torch.Tensor) -> None:
    made = exported("tiny", "int8", "portable")
    wrong = copy.deepcopy(made.module)
    wrong.get_submodule("out").input_scale *= 1.01
    ties = count_ties(wrong, made.path, clips.numpy())
    assert ties.worst_layer == "out"
    assert ties.num_unexplained > 100
    # With the codes forced, the wrong scale does not show in the output.
    assert ties.forced_relative_l2 < 1e-5
    assert ties.explanation() is None


def test_a_wrong_weight_is_no_tie(exported: Exporter, clips: torch.Tensor) -> None:
    made = exported("tiny", "nvfp4", "portable")
    wrong = copy.deepcopy(made.module)
    wrong.get_submodule("head").weight_tensor_scale *= 1.01
    ties = count_ties(wrong, made.path, clips.numpy())
    assert ties.forced_relative_l2 > 1e-3
    assert ties.explanation() is None


def test_a_tie_is_counted_and_does_not_spread(exported: Exporter, clips: torch.Tensor) -> None:
    made = exported("tiny", "int8", "portable")
    module = made.module
    stem = module.get_submodule("stem")
    # 2.5 steps of the stem's input, exactly: torch is made to round it up, ONNX rounds it down.
    x = clips.clone()
    x[0, 0, 0, 0, 0] = 2.5 * stem.input_scale
    assert stem.quantized_input(x)[0, 0, 0, 0, 0] == 2 * stem.input_scale
    nudged = copy.deepcopy(module)
    nudged.get_submodule("stem").register_forward_pre_hook(
        lambda _, inputs: (inputs[0] * (1 + 1e-6),)
    )
    ties = count_ties(nudged, made.path, x.numpy())
    assert ties.worst_layer == "stem"
    assert 1 <= ties.num_differing < 10
    assert ties.num_unexplained == 0
    assert ties.forced_relative_l2 < 1e-5
    assert re.match(r"1 of 21696 quantized values lie between two .* stem; ", ties.explanation())
    with torch.no_grad():
        assert (nudged(x) - module(x)).norm() / module(x).norm() > 1e-5


def test_the_module_is_left_as_it_was(exported: Exporter, clips: torch.Tensor) -> None:
    made = exported("tiny", "int8", "portable")
    with torch.no_grad():
        before = made.module(clips)
        count_ties(made.module, made.path, clips.numpy())
        assert torch.equal(made.module(clips), before)
    for layer in made.module.modules():
        if isinstance(layer, FrozenLayer):
            assert "quantized_input" not in vars(layer)


@pytest.mark.parametrize("format", ["int8", "nvfp4"])
def test_counts_every_value(exported: Exporter, clips: torch.Tensor, format: str) -> None:
    made = exported("tiny", format, "portable")
    # Inputs of the stem, qkv and out (2 x 4 x 4 tokens of 64), and head, for three clips.
    expected = 3 * (4 * 3 * 16 * 16 + 2 * 32 * 64 + 64)
    ties = count_ties(made.module, made.path, clips.numpy())
    assert ties.num_values == expected
    assert (ties.explanation() is None) == (ties.num_differing == 0)
