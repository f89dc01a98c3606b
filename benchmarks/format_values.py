"""The weights on which `benchmarks/formats.py` compares: drawn, trained, and the edges."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import torch

__all__ = ["NUM_CHANNELS", "drawn", "edges", "trained"]

# Divisible by every block and group size.
NUM_CHANNELS = 4096
_EDGE_CHANNELS = 128
# Per format: the largest element, and a 8-bit or 4-bit type that lists all elements.
_ELEMENTS = {
    "nvfp4": (6.0, ml_dtypes.float4_e2m1fn, 16),
    "mxfp4": (6.0, ml_dtypes.float4_e2m1fn, 16),
    "mxfp8": (448.0, ml_dtypes.float8_e4m3fn, 256),
    "fp8": (448.0, ml_dtypes.float8_e4m3fn, 256),
    "fp8_channel": (448.0, ml_dtypes.float8_e4m3fn, 256),
}


def drawn(num_rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Three distributions, float32 `[num_rows, 4096]`, standard deviation about 0.02."""
    generator = np.random.default_rng(0)
    shape = (num_rows, NUM_CHANNELS)
    yield "normal", torch.from_numpy(generator.standard_normal(shape, dtype=np.float32) * 0.02)
    heavy = generator.standard_t(3, shape) * 0.02 / 3**0.5
    yield "student t, 3 degrees", torch.from_numpy(heavy.astype(np.float32))
    blocks = generator.standard_normal((num_rows, NUM_CHANNELS // 16, 16), dtype=np.float32)
    blocks *= np.exp2(generator.integers(-18, 6, (*blocks.shape[:2], 1))).astype(np.float32)
    blocks[generator.random(blocks.shape[:2]) < 0.05] = 0
    yield "blocks of 2^-18 to 2^6, one in twenty zero", torch.from_numpy(blocks.reshape(shape))


def trained() -> torch.Tensor:
    """Every weight of the reference model penvideo20, float32 `[n, 4096]`, the last row cut off."""
    from vcompress.models.load import load_model

    module = load_model("reference:penvideo20").module
    weights = [p.detach().flatten() for p in module.parameters() if p.ndim >= 2]
    values = torch.cat(weights)
    return values[: len(values) // NUM_CHANNELS * NUM_CHANNELS].view(-1, NUM_CHANNELS).float()


def edges(format: str) -> dict[str, torch.Tensor]:
    """What is likely to go wrong in `format`, float32 `[n, 128]` by name."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8, _EDGE_CHANNELS, generator=generator)
    alone = torch.zeros(2, _EDGE_CHANNELS)
    alone[0, 5] = -3.0
    half_zero = normal.clone()
    half_zero[:, 64:] = 0
    signs = torch.where(normal < 0, -1.7, 1.7)
    mixed = normal.clone()
    mixed[:, ::3] *= 1e-42
    cases = {
        "zeros": torch.zeros(4, _EDGE_CHANNELS),
        "negative zeros": -torch.zeros(4, _EDGE_CHANNELS),
        "one value among zeros": alone,
        "zero blocks": half_zero,
        "+-amax alone": signs,
        "subnormal": normal * 1e-40,
        "subnormal among normal": mixed,
        "around 2^-126": normal * 2.0**-126,
        "around 2^-100": normal * 2.0**-100,
        "tiny, 1e-20": normal * 1e-20,
        "huge, 1e20": normal * 1e20,
        "2^126": signs.sign() * 2.0**126,
        "all magnitudes": normal * torch.exp2(torch.arange(128) - 64.0),
        "ties": _ties(format),
    }
    if format in ("mxfp4", "mxfp8"):
        cases["amax at, above and below a power of two"] = _powers(_ELEMENTS[format][0])
    if format == "nvfp4":
        cases["ties of block scales"] = _scale_ties()
    return cases


def _around(values: torch.Tensor) -> torch.Tensor:
    """`values`, their negatives, and the float32 numbers next to all of them."""
    infinity = torch.tensor(torch.inf)
    three = torch.cat(
        [values, torch.nextafter(values, infinity), torch.nextafter(values, -infinity)]
    )
    return torch.cat([three, -three])


def _ties(format: str) -> torch.Tensor:
    """Every element, every tie and their neighbours in blocks whose scales are exactly 1."""
    if format in _ELEMENTS:
        largest, element, count = _ELEMENTS[format]
        codes = np.arange(count, dtype=np.uint8).view(element).astype(np.float32)
        elements = torch.from_numpy(np.unique(np.abs(codes[np.isfinite(codes)])))
    else:
        largest = 127.0 if format == "int8" else 7.0
        elements = torch.arange(largest + 1)
    middles = (elements[1:] + elements[:-1]) / 2
    values = _around(torch.cat([elements, middles])).clamp(-largest, largest)
    # 15 values and the largest make a block of the smallest size.
    values = torch.cat([values, values.new_zeros(-len(values) % 120)]).view(-1, 15)
    blocks = torch.cat([torch.full((len(values), 1), largest), values], 1).view(-1, _EDGE_CHANNELS)
    if format != "nvfp4":
        return blocks
    # The first block gives the tensor scale 1.
    first = torch.zeros(1, _EDGE_CHANNELS)
    first[0, 0] = 6.0 * 448
    return torch.cat([first, blocks])


def _scale_ties() -> torch.Tensor:
    """Blocks of NVFP4 whose amax asks for an E4M3 scale, a tie of two, or a neighbour."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = torch.from_numpy(np.concatenate([codes, (codes[1:] + codes[:-1]) / 2]))
    amax = _around(6 * scales[scales > 0]).clamp(-6 * 448, 6 * 448)
    amax = torch.cat([torch.tensor([6.0 * 448]), amax])
    amax = torch.cat([amax, amax.new_zeros(-len(amax) % 8)])
    fractions = torch.linspace(1, -1, 16)
    return (amax[:, None] * fractions).view(-1, _EDGE_CHANNELS)


def _powers(largest: float) -> torch.Tensor:
    """Blocks of MX whose amax is `largest` times a power of two, or next to that."""
    amax = _around(largest * torch.exp2(torch.arange(-90.0, 110.0)))
    amax = torch.cat([amax, amax.new_zeros(-len(amax) % 4)])
    return (amax[:, None] * torch.linspace(1, -1, 32)).view(-1, _EDGE_CHANNELS)
