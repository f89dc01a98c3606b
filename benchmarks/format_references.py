"""What `benchmarks/formats.py` compares the number formats with, all brought into one form.

Three independent references: our docstrings written down again in numpy with the casts of
ml_dtypes, modelopt's quantized tensors on a CPU, and torchao (`pip install torchao`; left out where
it is not installed). Where a reference computes something else on purpose or by its rounding,
`variant` computes that too: our arithmetic with the steps replaced that `because` names. A
difference counts as explained if the variant equals the reference bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vcompress.benchmarks import format_numpy, format_variants
from vcompress.benchmarks.format_stored import INT4_GROUPS, Stored
from vcompress.compress.numerics import e2m1, fp8, int4, int8, mxfp4, mxfp8, nvfp4

__all__ = ["FORMATS", "Reference", "nvfp4_packers", "ours", "references"]

FORMATS = ("nvfp4", "mxfp4", "mxfp8", "fp8", "fp8_channel", "int8", *INT4_GROUPS)
_RECIPROCAL = "multiplies by 1 / scale instead of dividing, which rounds twice"
_OWN_TYPE = "computes the scale in the type of the weight"
_NO_ZERO_SCALE = "a scale of zeros is 0, the codes are NaN or undefined"
_LOGARITHM = "the scale is 2^ceil(log2 ...) with a rounded logarithm"

Quantize = Callable[[torch.Tensor], Stored]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Another implementation of a format.

    Attributes:
        name: the library and what of it is called.
        quantize: a weight `[N, K]` of float32 or bfloat16 to its stored form.
        because: the steps that differ from ours, None if every bit must be equal.
        variant: our arithmetic with those steps.
    """

    name: str
    quantize: Quantize
    because: str | None = None
    variant: Quantize | None = None


def ours(format: str) -> Quantize:
    """The product's own quantization of weights."""

    def quantize(weight: torch.Tensor) -> Stored:
        stored: Any
        if format == "nvfp4":
            stored = nvfp4.quantize_weight(weight)
            elements = e2m1.decode(stored.packed)
            return Stored(elements, stored.block_scale.float(), stored.tensor_scale)
        if format == "mxfp4":
            stored = mxfp4.quantize_weight(weight)
            return Stored(e2m1.decode(stored.packed), stored.block_scale.float())
        if format == "mxfp8":
            stored = mxfp8.quantize_weight(weight)
            return Stored(stored.codes.float(), stored.block_scale.float())
        if format in INT4_GROUPS:
            stored = int4.quantize_weight(weight, group_size=INT4_GROUPS[format])
            return Stored(int4.unpack(stored.packed).float(), stored.scale.float())
        if format == "int8":
            stored = int8.quantize_weight(weight)
        else:
            stored = fp8.quantize_weight(weight, per_channel=format == "fp8_channel")
        return Stored(stored.codes.float(), stored.scale.reshape(-1, 1))

    return quantize


def references(format: str, *, with_torchao: bool = True) -> list[Reference]:
    """Every implementation of `format`; torchao's only where it is installed."""
    found = [_numpy(format)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.append(_modelopt(format))
        if with_torchao and importlib.util.find_spec("torchao") is not None:
            logging.getLogger("torchao").setLevel(logging.ERROR)
            found += _torchao(format)
    return found


def nvfp4_packers() -> dict[str, Callable[[torch.Tensor], object]]:
    """What packs a weight `[N, K]` to NVFP4, modelopt first; each call does that and no more."""
    peer = _modelopt_class("nvfp4_tensor", "NVFP4QTensor")
    packers: dict[str, Callable[[torch.Tensor], object]] = {
        "modelopt NVFP4QTensor": lambda weight: peer.quantize(weight, 16),
        "vcompress": nvfp4.quantize_weight,
    }
    if importlib.util.find_spec("torchao") is not None:
        module: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")
        packers["torchao nvfp4_quantize"] = lambda weight: module.nvfp4_quantize(
            weight, 16, module.per_tensor_amax_to_scale(weight.abs().amax())
        )
    return packers


def _numpy(format: str) -> Reference:
    quantize = format_numpy.quantizer(format)
    if format not in ("nvfp4", "mxfp4"):
        return Reference(name="numpy and ml_dtypes", quantize=quantize)
    return Reference(
        name="numpy and ml_dtypes",
        quantize=quantize,
        because="negative zeros keep their sign",
        variant=format_variants.with_signs_of_zeros(ours(format)),
    )


def _modelopt_class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"modelopt.torch.quantization.qtensor.{module}"), name)


def _modelopt(format: str) -> Reference:
    if format == "nvfp4":
        peer = _modelopt_class("nvfp4_tensor", "NVFP4QTensor")

        def nvfp4_tensor(weight: torch.Tensor) -> Stored:
            stored, block_scale, tensor_scale = peer.quantize(weight.clone(), 16)
            return Stored(e2m1.decode(stored._quantized_data), block_scale.float(), tensor_scale)

        return Reference(
            name="modelopt NVFP4QTensor",
            quantize=nvfp4_tensor,
            because="a tensor scale of zeros is 0, and small ones have no lower bound",
            variant=format_variants.nvfp4_without_bound,
        )
    if format == "mxfp4":
        peer = _modelopt_class("mxfp4_tensor", "MXFP4QTensor")

        def mxfp4_tensor(weight: torch.Tensor) -> Stored:
            stored, exponent = peer.quantize(weight, 32)
            scale = format_variants.power(exponent.view(len(weight), -1))
            return Stored(e2m1.decode(stored._quantized_data), scale)

        return Reference(
            name="modelopt MXFP4QTensor",
            quantize=mxfp4_tensor,
            because="ties .75, 1.75 and 3.5 go toward zero, positive zeros have the code of "
            f"negative ones; {_LOGARITHM}, at least 2^-127, and that for zeros",
            variant=format_variants.mxfp4_of_modelopt,
        )
    if format == "mxfp8":
        peer = _modelopt_class("mxfp8_tensor", "MXFP8QTensor")

        def mxfp8_tensor(weight: torch.Tensor) -> Stored:
            stored, exponent = peer.quantize(weight)
            return Stored(stored._quantized_data.float(), format_variants.power(exponent))

        return Reference(
            name="modelopt MXFP8QTensor",
            quantize=mxfp8_tensor,
            because=f"{_LOGARITHM}, at least 2^-127, and that for zeros",
            variant=format_variants.mxfp8_of_modelopt,
        )
    if format in INT4_GROUPS:
        peer, group = _modelopt_class("int4_tensor", "INT4QTensor"), INT4_GROUPS[format]

        def int4_tensor(weight: torch.Tensor) -> Stored:
            stored, inverse = peer.quantize(weight, group)
            pairs = torch.stack((stored._quantized_data >> 4, stored._quantized_data & 15), -1)
            inverse = inverse.view(len(weight), -1).float()
            return Stored(pairs.flatten(-2).float() - 8, 1 / inverse)

        return Reference(
            name="modelopt INT4QTensor",
            quantize=int4_tensor,
            because="stores 7 / amax in the type of the weight, not amax / 7 in float16, and "
            "multiplies by it; that of zeros is infinite",
            variant=format_variants.int4_of_modelopt(group),
        )
    integer = format == "int8"
    peer = _modelopt_class(
        *(("int8_tensor", "INT8QTensor") if integer else ("fp8_tensor", "FP8QTensor"))
    )
    axis = None if format == "fp8" else 0

    def eight_bit_tensor(weight: torch.Tensor) -> Stored:
        stored, scale = peer.quantize(weight, axis=axis)
        return Stored(stored._quantized_data.float(), scale.float().reshape(-1, 1))

    return Reference(
        name=f"modelopt {peer.__name__}",
        quantize=eight_bit_tensor,
        because=f"{_OWN_TYPE} and divides in it; {_NO_ZERO_SCALE}, small ones have no lower bound",
        variant=format_variants.eight_bits_in_own_type(format),
    )


def _torchao(format: str) -> list[Reference]:
    if format == "nvfp4":
        module: Any = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

        def nvfp4_tensor(weight: torch.Tensor) -> Stored:
            tensor_scale = module.per_tensor_amax_to_scale(weight.abs().amax())
            block_scale, packed = module.nvfp4_quantize(weight, 16, tensor_scale)
            return Stored(e2m1.decode(packed), block_scale.float(), tensor_scale)

        return [
            Reference(
                name="torchao nvfp4_quantize",
                quantize=nvfp4_tensor,
                because=f"{_RECIPROCAL}; the block scale is amax / 6 / tensor_scale, at least 2^-6 "
                "instead of 2^-9, and that for zeros; "
                "negative zeros keep their sign, and a weight of zeros has NaN scales",
                variant=format_variants.nvfp4_of_torchao,
            )
        ]
    if format in ("mxfp4", "mxfp8"):
        return _torchao_microscaling(format)
    if format in ("fp8", "fp8_channel"):
        return [_torchao_fp8(format)]
    return [_torchao_integer(format)]


def _torchao_microscaling(format: str) -> list[Reference]:
    module: Any = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    four_bits = format == "mxfp4"
    element = torch.float4_e2m1fn_x2 if four_bits else torch.float8_e4m3fn

    def quantizer(mode: str) -> Quantize:
        def quantize(weight: torch.Tensor) -> Stored:
            scale, codes = module.to_mx(
                weight, element, 32, getattr(module.ScaleCalculationMode, mode)
            )
            elements = e2m1.decode(codes) if four_bits else codes.float()
            return Stored(elements, scale.float())

        return quantize

    return [
        Reference(
            name="torchao to_mx RCEIL",
            quantize=quantizer("RCEIL"),
            because=f"{_LOGARITHM}, at least 2^-127, and that for zeros",
            variant=format_variants.microscaling_of_torchao(format, floor=False),
        ),
        Reference(
            name="torchao to_mx FLOOR",
            quantize=quantizer("FLOOR"),
            because="the scale of section 6.3 of the specification, 2^(floor(log2(amax)) - largest "
            "exponent), with which the largest values of a block can saturate",
            variant=format_variants.microscaling_of_torchao(format, floor=True),
        ),
    ]


def _torchao_fp8(format: str) -> Reference:
    module: Any = importlib.import_module("torchao.quantization.quant_primitives")

    def quantize(weight: torch.Tensor) -> Stored:
        block = list(weight.shape) if format == "fp8" else [1, weight.shape[1]]
        scale = module._choose_scale_float8(weight, block)
        codes = module._quantize_affine_float8(weight, scale)
        return Stored(codes.float(), scale.reshape(-1, 1))

    return Reference(
        name=f"torchao float8 {'tensorwise' if format == 'fp8' else 'rowwise'}",
        quantize=quantize,
        because=f"{_OWN_TYPE}; {_NO_ZERO_SCALE}, small ones have no lower bound",
        variant=format_variants.fp8_of_torchao(format),
    )


def _torchao_integer(format: str) -> Reference:
    module: Any = importlib.import_module("torchao.quantization.quant_primitives")
    largest = 127 if format == "int8" else 7

    def quantize(weight: torch.Tensor) -> Stored:
        block = [1, INT4_GROUPS.get(format, weight.shape[1])]
        scale, zero_point = module.choose_qparams_affine(
            weight, module.MappingType.SYMMETRIC, block, torch.int8, -largest, largest,
            scale_dtype=torch.float32, keepdim=True,
        )  # fmt: skip
        codes = module.quantize_affine(
            weight, block, scale, zero_point, torch.int8, -largest - 1, largest
        )
        return Stored(codes.float(), scale.reshape(len(weight), -1))

    return Reference(
        name=f"torchao affine {'int8' if format == 'int8' else 'int4'}",
        quantize=quantize,
        because=f"{_RECIPROCAL}; {_OWN_TYPE}, at least 2^-126, and that for zeros"
        + ("" if format == "int8" else ", not in float16"),
        variant=format_variants.integers_of_torchao(format, INT4_GROUPS.get(format)),
    )
