from __future__ import annotations

import pytest
import torch

from vcompress.benchmarks.format_references import FORMATS, ours, references
from vcompress.benchmarks.format_values import drawn, edges
from vcompress.benchmarks.formats import compare, is_equal, measure_elements

# On float32 weights of ordinary size modelopt stores the very same bits in these formats.
SAME_AS_MODELOPT = ("nvfp4", "mxfp8", "fp8", "fp8_channel", "int8")


@pytest.mark.filterwarnings("ignore:Skipping extension")
@pytest.mark.parametrize("format", FORMATS)
def test_weights_equal_numpy_and_are_explained_in_modelopt(format: str) -> None:
    # Normal, heavy-tailed and of many magnitudes: 3 x 32,768 values, in two types.
    from_numpy, modelopt = references(format, with_torchao=False)
    for name, weight in drawn(8):
        for given in (weight, weight.bfloat16(), weight.bfloat16().float()):
            mine = ours(format)(given)
            assert is_equal(compare(given, mine, from_numpy)), name
            row = compare(given, mine, modelopt)
            assert row["num_unexplained"] == 0, name
            if format in SAME_AS_MODELOPT and given.dtype == torch.float32:
                assert row["num_codes_different"] == 0, name
                # Only blocks of zeros have another scale.
                assert "zero" in name or row["num_scales_different"] == 0, name


@pytest.mark.filterwarnings("ignore:Skipping extension")
@pytest.mark.parametrize("format", FORMATS)
def test_edges_equal_numpy_and_are_explained_in_modelopt(format: str) -> None:
    from_numpy, modelopt = references(format, with_torchao=False)
    # The scales of int4 are float16.
    refused = ("huge, 1e20", "2^126", "all magnitudes") if format.startswith("int4") else ()
    for name, weight in edges(format).items():
        if name in refused:
            continue
        mine = ours(format)(weight)
        row = compare(weight, mine, from_numpy)
        assert row["num_unexplained"] == 0, name
        assert is_equal({**row, "num_zeros_of_other_sign": 0}), name
        assert compare(weight, mine, modelopt)["num_unexplained"] == 0, name


def test_a_single_wrong_bit_is_seen() -> None:
    # The comparison itself can fail: one scale and two elements, each off by its last bit.
    _, weight = next(iter(drawn(1)))
    mine = ours("mxfp8")(weight)
    reference = references("mxfp8", with_torchao=False)[0]
    for tensor, index in ((mine.scales, (0, 5)), (mine.elements, (0, 77)), (mine.elements, (0, 3))):
        kept = tensor[index].clone()
        tensor[index] = torch.nextafter(kept, torch.tensor(torch.inf))
        row = compare(weight, mine, reference)
        assert not is_equal(row)
        assert row["num_unexplained"] == 1
        tensor[index] = kept
    assert is_equal(compare(weight, mine, reference))


def test_elements_of_inputs_round_like_ml_dtypes() -> None:
    # Every bfloat16 number, NaN and infinities among them, and 10^5 others.
    rows = measure_elements(10**5)
    assert {row["element"] for row in rows} == {"E4M3", "E2M1", "INT8"}
    assert [row["num_different"] for row in rows] == [0] * len(rows)
