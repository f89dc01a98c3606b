"""What techniques could do at most, against Amdahl's law by hand."""

from __future__ import annotations

import pytest

from vcompress.validate.profile import LayerTime, ceilings


def layer(name: str, *, in_block: bool, **by_class: float) -> LayerTime:
    found = {key.replace("_", " "): seconds for key, seconds in by_class.items()}
    return LayerTime(
        name=name, kind=max(found, key=found.__getitem__), in_block=in_block, tokens=1,
        operations=6, bytes=3, seconds=sum(found.values()), by_class=found,
    )  # fmt: skip


LAYERS = (
    layer("stem", in_block=False, convolution=1.0),
    layer("block.mlp", in_block=True, linear=5.0),
    layer("block.attention", in_block=True, spatial_attention=2.0, rest=1.0),
    layer("head", in_block=False, linear=1.0),
)


def test_the_law_by_hand() -> None:
    found = {
        each.technique: each for each in ceilings(LAYERS, 10.0, has_tokens=True, is_denoiser=True)
    }
    weights = found["quantize linears and convolutions"]
    assert weights.share == pytest.approx(0.7)
    assert weights.limit == pytest.approx(1 / 0.3)
    assert weights.speedup == pytest.approx(1 / (0.3 + 0.7 / 4))
    products = found["quantize attention's products"]
    assert products.speedup == pytest.approx(1 / (0.8 + 0.2 / 4))
    # Half of 8 seconds in blocks goes; of the attention's 2 another quarter.
    tokens = found["reduce tokens"]
    assert tokens.speedup == pytest.approx(10 / (10 - 4 - 0.5))
    assert found["cache blocks over steps"].speedup == pytest.approx(10 / (10 - 0.6 * 8))


def test_only_what_applies_is_offered_best_first() -> None:
    found = ceilings(LAYERS[:2], 6.0, has_tokens=False, is_denoiser=False)
    assert [each.technique for each in found] == ["quantize linears and convolutions"]
    both = ceilings(LAYERS, 10.0, has_tokens=True, is_denoiser=True)
    assert [each.speedup for each in both] == sorted((e.speedup for e in both), reverse=True)


def test_intensity_is_operations_a_byte() -> None:
    assert LAYERS[0].intensity == 2
